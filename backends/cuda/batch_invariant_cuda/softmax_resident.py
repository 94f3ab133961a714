"""softmax and log_softmax of 16-bit rows that one program holds, written in Gluon.

Long rows: a multiprocessor's shared memory holds a row's first segments, registers the rest, so
that each element is read once. A program takes row after row; the next row goes to the L2 cache
while this one's exponentials are added up, and to shared memory while its results are made.

Few rows: registers hold all of a row on many warps, whose lanes meet once, in shared memory.
Triton would let them meet at every halving. Order as in `rows.py`.
"""

# ruff: noqa: RUF005  (compiled by Triton, which knows less of Python)
from __future__ import annotations

from functools import cache

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from batch_invariant_cuda import explog, rows
from batch_invariant_cuda.row_launch import Plan, RowKernel, multiprocessors

_LANES = gl.constexpr(rows.LANES)
_SEGMENT = gl.constexpr(rows.SEGMENT)
_DEPTH = gl.constexpr(rows.SEGMENT // rows.LANES)
_ALL = gl.constexpr(tl.PropagateNan.ALL)
_NEAR = rows.NEAR

_exp = gluon.jit(explog.exp.fn)
_near_exp = gluon.jit(explog.near_exp.fn)
_near_div = gluon.jit(explog.near_div.fn)
_log = gluon.jit(explog.log.fn)
_rounded = gluon.jit(rows.rounded.fn)
_take_turn = gluon.jit(rows.take_turn.fn)
_wider = gluon.jit(rows.wider.fn)


@gluon.jit
def _extremes(a_top, a_bottom, b_top, b_bottom):
    return gl.maximum(a_top, b_top, propagate_nan=_ALL), gl.minimum(a_bottom, b_bottom)


@gluon.constexpr_function
def _lane_layout(warps):
    return gl.BlockedLayout([1024 // (32 * warps)], [32], [warps], [0])


@gluon.constexpr_function
def _fold_layout(warps):
    return gl.BlockedLayout([16, 2], [1, 32], [1, warps], [1, 0])


@gluon.jit
def _fold(lanes, WARPS: gl.constexpr):
    """`rows.fold` of 1024 lanes: each warp has all, sixteen of a residue modulo 64 in a thread."""
    v = gl.convert_layout(gl.reshape(lanes, [16, 64]), _fold_layout(WARPS))
    v = gl.sum(gl.reshape(v, [2, 8, 64]), 0)
    v = gl.sum(gl.reshape(v, [2, 4, 64]), 0)
    v = gl.sum(gl.reshape(v, [2, 2, 64]), 0)
    v = gl.sum(v, 0)
    v = gl.sum(gl.reshape(v, [2, 32]), 0)
    v = gl.sum(gl.reshape(v, [2, 16]), 0)
    v = gl.sum(gl.reshape(v, [2, 8]), 0)
    v = gl.sum(gl.reshape(v, [2, 4]), 0)
    v = gl.sum(gl.reshape(v, [2, 2]), 0)
    return gl.sum(v, 0) + 0.0


@gluon.jit
def _fetch(row, there, slots, s, WARPS: gl.constexpr):
    """Begins the copy of segment s of a row, if it is there, to its slot."""
    at = gl.arange(0, _SEGMENT, gl.BlockedLayout([8], [32], [WARPS], [0]))
    async_copy.async_copy_global_to_shared(
        slots.index(s), row + s * _SEGMENT + at, mask=(at >= 0) & there
    )
    async_copy.commit_group()


@gluon.jit
def _prefetch(row, s):
    """Begins to bring segment s of a row to the L2 cache."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
        " @p cp.async.bulk.prefetch.L2.global [$1], 16384; mov.u32 $0, 0; }",
        "=r,l",
        [(row + s * _SEGMENT).to(gl.int64)],
        gl.int32,
        False,
        1,
    )


@gluon.jit
def _fetch_rest(row, columns, n, S: gl.constexpr, T: gl.constexpr, FILL: gl.constexpr):
    """The T tiles of a row from segment S on; FILL beyond its end."""
    rest = ()
    for t in gl.static_range(T):
        at = S * _SEGMENT + t * _LANES + columns
        if t < T - 1:
            rest = rest + (gl.load(row + at),)
        else:
            rest = rest + (gl.load(row + at, mask=at < n, other=FILL),)
    return rest


@gluon.jit
def _tiles(held, s, layout: gl.constexpr):
    """The terms of segment s."""
    tiles = ()
    for t in gl.static_range(_DEPTH):
        tiles = tiles + (held.index(s * _DEPTH + t).load(layout),)
    return tiles


@gluon.jit
def _exponential(x, top):
    return _near_exp(x.to(gl.float32) - top)


@gluon.jit
def _output(x, top, total, reciprocal, LOG: gl.constexpr):
    if LOG:
        return (x.to(gl.float32) - top) - total
    else:  # noqa: RET505  (Triton compiles what follows a plain return)
        return _near_div(_exponential(x, top), total, reciprocal)


@gluon.jit
def _near_row(
    held,
    slots,
    rest,
    to,
    next_row,
    more,
    columns,
    n,
    top,
    LOG: gl.constexpr,
    S: gl.constexpr,
    T: gl.constexpr,
    WARPS: gl.constexpr,
):
    """The results of a row that is held, and the copies of the next row's segments."""
    LANE: gl.constexpr = _lane_layout(WARPS)
    lanes = gl.zeros([_LANES], gl.float32, LANE)
    for s in range(S):
        _prefetch(next_row, s)
        tiles = _tiles(held, s, LANE)
        part = gl.zeros([_LANES], gl.float32, LANE)
        for t in gl.static_range(_DEPTH):
            part += _exponential(tiles[t], top)
        lanes += part
    for first in gl.static_range(0, T, _DEPTH):
        if S > 0 and first + _DEPTH < T:
            _prefetch(next_row, S + first // _DEPTH)
        part = gl.zeros([_LANES], gl.float32, LANE)
        for t in gl.static_range(first, min(first + _DEPTH, T)):
            e = _exponential(rest[t], top)
            if t == T - 1:
                e = gl.where(S * _SEGMENT + t * _LANES + columns < n, e, 0.0)
            part += e
        lanes += part
    total = _fold(lanes, WARPS)
    reciprocal = gl.div_rn(1.0, total)
    if LOG:
        total = _log(total)
    for s in range(S):
        tiles = _tiles(held, s, LANE)
        _fetch(next_row, more, slots, s, WARPS)
        for t in gl.static_range(_DEPTH):
            y = _output(tiles[t], top, total, reciprocal, LOG)
            at = s * _SEGMENT + t * _LANES + columns
            gl.store(to + at, y.to(to.dtype.element_ty))
    for t in gl.static_range(T):
        y = _output(rest[t], top, total, reciprocal, LOG).to(to.dtype.element_ty)
        at = S * _SEGMENT + t * _LANES + columns
        if t < T - 1:
            gl.store(to + at, y)
        else:
            gl.store(to + at, y, mask=at < n)


@gluon.jit
def _walked(x, out, columns, n, top, LOG: gl.constexpr, WARPS: gl.constexpr):
    """A row for the slow parts of exp."""
    lanes = gl.zeros([_LANES], gl.float32, _lane_layout(WARPS))
    for start in range(0, n, _SEGMENT):
        part = gl.zeros([_LANES], gl.float32, _lane_layout(WARPS))
        for at in range(start, gl.minimum(start + _SEGMENT, n), _LANES):
            there = at + columns < n
            v = gl.load(x + at + columns, mask=there, other=0.0).to(gl.float32) - top
            part += gl.where(there, _exp(v, True), 0.0)
        lanes += part
    total = _fold(lanes, WARPS)
    if LOG:
        total = _log(total)
    for at in range(0, n, _LANES):
        there = at + columns < n
        v = gl.load(x + at + columns, mask=there, other=0.0).to(gl.float32) - top
        y = v - total if LOG else gl.div_rn(_exp(v, True), total)
        gl.store(out + at + columns, _rounded(y, out.dtype.element_ty), mask=there)


@gluon.jit(do_not_specialize=["n_units", "count"])
def _softmax_kernel(
    x,
    out,
    n_units,
    count,
    LOG: gl.constexpr,
    S: gl.constexpr,
    T: gl.constexpr,
    WARPS: gl.constexpr,
):
    """S segments of a row in shared memory, T tiles in registers."""
    LANE: gl.constexpr = _lane_layout(WARPS)
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    slots = gl.allocate_shared_memory(x.dtype.element_ty, [max(S, 1), _SEGMENT], shared)
    held = slots._reinterpret(x.dtype.element_ty, [max(S, 1) * _DEPTH, _LANES], shared)
    _take_turn()
    columns = gl.arange(0, _LANES, LANE)
    n = n_units * 16
    row = gl.program_id(0)
    for first in range(S):
        _fetch(x + row.to(gl.int64) * n, row < count, slots, first, WARPS)
    while row < count:
        own = x + row.to(gl.int64) * n
        to = out + row.to(gl.int64) * n
        following = row + gl.num_programs(0)
        next_row = x + gl.minimum(following, count - 1).to(gl.int64) * n
        rest = _fetch_rest(own, columns, n, S, T, float("-inf"))
        top_each = gl.full([_LANES], float("-inf"), x.dtype.element_ty, LANE)
        bottom_each = gl.full([_LANES], float("inf"), x.dtype.element_ty, LANE)
        for i in gl.static_range(S):
            async_copy.wait_group(S - 1 - i)
            tiles = _tiles(held, i, LANE)
            for t in gl.static_range(_DEPTH):
                top_each, bottom_each = _wider(top_each, bottom_each, tiles[t])
        for t in gl.static_range(T):
            v = rest[t]
            if t == T - 1:
                v = gl.where(S * _SEGMENT + t * _LANES + columns < n, v, rest[0])
            top_each, bottom_each = _wider(top_each, bottom_each, v)
        top, bottom = gl.reduce((top_each.to(gl.float32), bottom_each.to(gl.float32)), 0, _extremes)
        if top - bottom < _NEAR:
            more = following < count
            _near_row(held, slots, rest, to, next_row, more, columns, n, top, LOG, S, T, WARPS)
        else:  # rare: little code, and read again
            _walked(own, to, columns, n, top, LOG, WARPS)
            for s in range(S):
                _fetch(next_row, following < count, slots, s, WARPS)
        row = following
    async_copy.wait_group(0)


_TILES = range(2, 49)  # of a row in registers
_SLOTS = 13  # segments of a row in shared memory; with a fourteenth there is no room to fold
_SHARED = 227 << 10
WARPS = 16

resident = RowKernel(_softmax_kernel, overlaps=rows.FEW.value, registers={WARPS: 128})


@cache
def _shared_memory(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def place_of(x: torch.Tensor, shape: Plan) -> tuple[int, tuple[int, int, int]] | None:
    """Programs, and S, T and WARPS of the kernel, for rows of x [rows, n]; None for other kernels.

    Rows of 16 warps that find a multiprocessor each are held in registers alone.
    """
    if x.element_size() != 2 or not x.is_cuda or shape.split or shape.unit == 1:
        return None
    count, n = x.shape
    processors = multiprocessors(x.device.index)
    terms = -(-n // rows.LANES)
    if shape.tiles:
        few = shape.warps == WARPS and count <= processors
        return (count, (0, terms, WARPS)) if few else None
    tiles = terms - _SLOTS * _DEPTH.value
    if tiles not in _TILES or _shared_memory(x.device.index) < _SHARED:
        return None
    return min(count, processors), (_SLOTS, tiles, WARPS)
