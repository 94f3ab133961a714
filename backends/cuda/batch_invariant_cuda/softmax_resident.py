"""softmax and log_softmax of 16-bit rows that one program holds, written in Gluon.

Long rows: see `resident.py`. The next row goes to the L2 cache while this one's exponentials are
added up, and to shared memory while its results are made.

Short rows: registers hold all of a row, and its warps meet three times; Triton would let them meet
at every halving of the lanes. Where rows are many, one that comes later goes to the L2 cache.
Order as in `rows.py`.
"""

# ruff: noqa: RUF005  (compiled by Triton, which knows less of Python)
from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from batch_invariant_cuda import explog, rows
from batch_invariant_cuda.resident import (
    DEPTH,
    LANES,
    SEGMENT,
    fetch,
    fetch_rest,
    fold,
    lane_layout,
    place_of,
    prefetch,
    prefetch_bytes,
    rounded,
    segment_tiles,
    take_turn,
)
from batch_invariant_cuda.row_launch import Plan, RowKernel, multiprocessors

_ALL = gl.constexpr(tl.PropagateNan.ALL)
_NEAR = rows.NEAR

_exp = gluon.jit(explog.exp.fn)
_near_exp = gluon.jit(explog.near_exp.fn)
_near_div = gluon.jit(explog.near_div.fn)
_log = gluon.jit(explog.log.fn)
_wider = gluon.jit(rows.wider.fn)


@gluon.jit
def _extremes(a_top, a_bottom, b_top, b_bottom):
    return gl.maximum(a_top, b_top, propagate_nan=_ALL), gl.minimum(a_bottom, b_bottom)


@gluon.jit
def _range(top, bottom, tiles, columns, n, start, T: gl.constexpr):
    """The largest and smallest of `top`, `bottom` and T tiles from `start` on to a row's end."""
    for t in gl.static_range(T):
        v = tiles[t]
        if t == T - 1:
            v = gl.where(start + t * LANES + columns < n, v, tiles[0])
        top, bottom = _wider(top, bottom, v)
    return gl.reduce((top.to(gl.float32), bottom.to(gl.float32)), 0, _extremes)


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
    LANE: gl.constexpr = lane_layout(WARPS)
    lanes = gl.zeros([LANES], gl.float32, LANE)
    for s in range(S):
        prefetch(next_row, s)
        tiles = segment_tiles(held, s, LANE)
        part = gl.zeros([LANES], gl.float32, LANE)
        for t in gl.static_range(DEPTH):
            part += _exponential(tiles[t], top)
        lanes += part
    for first in gl.static_range(0, T, DEPTH):
        if first + DEPTH < T:
            prefetch(next_row, S + first // DEPTH)
        part = gl.zeros([LANES], gl.float32, LANE)
        for t in gl.static_range(first, min(first + DEPTH, T)):
            e = _exponential(rest[t], top)
            if t == T - 1:
                e = gl.where(S * SEGMENT + t * LANES + columns < n, e, 0.0)
            part += e
        lanes += part
    total = fold(lanes, WARPS)
    reciprocal = gl.div_rn(1.0, total)
    if LOG:
        total = _log(total)
    for s in range(S):
        tiles = segment_tiles(held, s, LANE)
        fetch(next_row, more, slots, s, WARPS)
        for t in gl.static_range(DEPTH):
            y = _output(tiles[t], top, total, reciprocal, LOG)
            at = s * SEGMENT + t * LANES + columns
            gl.store(to + at, y.to(to.dtype.element_ty))
    for t in gl.static_range(T):
        y = _output(rest[t], top, total, reciprocal, LOG).to(to.dtype.element_ty)
        at = S * SEGMENT + t * LANES + columns
        if t < T - 1:
            gl.store(to + at, y)
        else:
            gl.store(to + at, y, mask=at < n)


@gluon.jit
def _walked(x, out, columns, n, top, LOG: gl.constexpr, WARPS: gl.constexpr):
    """A row for the slow parts of exp."""
    lanes = gl.zeros([LANES], gl.float32, lane_layout(WARPS))
    for start in range(0, n, SEGMENT):
        part = gl.zeros([LANES], gl.float32, lane_layout(WARPS))
        for at in range(start, gl.minimum(start + SEGMENT, n), LANES):
            there = at + columns < n
            v = gl.load(x + at + columns, mask=there, other=0.0).to(gl.float32) - top
            part += gl.where(there, _exp(v, True), 0.0)
        lanes += part
    total = fold(lanes, WARPS)
    if LOG:
        total = _log(total)
    for at in range(0, n, LANES):
        there = at + columns < n
        v = gl.load(x + at + columns, mask=there, other=0.0).to(gl.float32) - top
        y = v - total if LOG else gl.div_rn(_exp(v, True), total)
        gl.store(out + at + columns, rounded(y, out.dtype.element_ty), mask=there)


@gluon.jit(do_not_specialize=["n_units", "count"])
def _long_kernel(
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
    LANE: gl.constexpr = lane_layout(WARPS)
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    slots = gl.allocate_shared_memory(x.dtype.element_ty, [S, SEGMENT], shared)
    held = slots._reinterpret(x.dtype.element_ty, [S * DEPTH, LANES], shared)
    take_turn()
    columns = gl.arange(0, LANES, LANE)
    n = n_units * 16
    row = gl.program_id(0)
    for first in range(S):
        fetch(x + row.to(gl.int64) * n, row < count, slots, first, WARPS)
    while row < count:
        own = x + row.to(gl.int64) * n
        to = out + row.to(gl.int64) * n
        following = row + gl.num_programs(0)
        next_row = x + gl.minimum(following, count - 1).to(gl.int64) * n
        rest = fetch_rest(own, columns, n, S, T, 0, T, float("-inf"))
        top_each = gl.full([LANES], float("-inf"), x.dtype.element_ty, LANE)
        bottom_each = gl.full([LANES], float("inf"), x.dtype.element_ty, LANE)
        for i in gl.static_range(S):
            async_copy.wait_group(S - 1 - i)
            tiles = segment_tiles(held, i, LANE)
            for t in gl.static_range(DEPTH):
                top_each, bottom_each = _wider(top_each, bottom_each, tiles[t])
        top, bottom = _range(top_each, bottom_each, rest, columns, n, S * SEGMENT, T)
        if top - bottom < _NEAR:
            more = following < count
            _near_row(held, slots, rest, to, next_row, more, columns, n, top, LOG, S, T, WARPS)
        else:  # rare: little code, and read again
            _walked(own, to, columns, n, top, LOG, WARPS)
            for s in range(S):
                fetch(next_row, following < count, slots, s, WARPS)
        row = following
    async_copy.wait_group(0)


@gluon.jit
def _short_row(
    tiles,
    to,
    columns,
    n,
    top,
    LOG: gl.constexpr,
    T: gl.constexpr,
    WARPS: gl.constexpr,
    NEAR: gl.constexpr,
):
    lanes = gl.zeros([LANES], gl.float32, lane_layout(WARPS))
    each = ()
    for first in gl.static_range(0, T, DEPTH):
        part = gl.zeros([LANES], gl.float32, lane_layout(WARPS))
        for t in gl.static_range(first, min(first + DEPTH, T)):
            v = tiles[t].to(gl.float32) - top
            e = _near_exp(v) if NEAR else _exp(v, True)
            if not LOG:
                each = each + (e,)
            if t == T - 1:
                e = gl.where(t * LANES + columns < n, e, 0.0)
            part += e
        lanes += part
    total = fold(lanes, WARPS)
    reciprocal = gl.div_rn(1.0, total)
    if LOG:
        total = _log(total)
    for t in gl.static_range(T):
        if LOG:
            y = (tiles[t].to(gl.float32) - top) - total
        else:
            y = _near_div(each[t], total, reciprocal) if NEAR else gl.div_rn(each[t], total)
        y = y.to(to.dtype.element_ty) if NEAR else rounded(y, to.dtype.element_ty)
        at = t * LANES + columns
        if t < T - 1:
            gl.store(to + at, y)
        else:
            gl.store(to + at, y, mask=at < n)


@gluon.jit(do_not_specialize=["n_units", "ahead"])
def _short_kernel(
    x,
    out,
    n_units,
    ahead,
    LOG: gl.constexpr,
    T: gl.constexpr,
    WARPS: gl.constexpr,
):
    """T tiles in registers; the row that comes `ahead` rows later is sent for."""
    LANE: gl.constexpr = lane_layout(WARPS)
    take_turn()
    columns = gl.arange(0, LANES, LANE)
    n = n_units * 16
    row = gl.program_id(0).to(gl.int64)
    to = out + row * n
    tiles = fetch_rest(x + row * n, columns, n, 0, T, 0, T, float("-inf"))
    later = row + ahead
    prefetch_bytes(x + later * n, gl.where(later < gl.num_programs(0), n * 2, 0))
    top_each = gl.full([LANES], float("-inf"), x.dtype.element_ty, LANE)
    bottom_each = gl.full([LANES], float("inf"), x.dtype.element_ty, LANE)
    top, bottom = _range(top_each, bottom_each, tiles, columns, n, 0, T)
    if top - bottom < _NEAR:
        _short_row(tiles, to, columns, n, top, LOG, T, WARPS, True)
    else:
        _short_row(tiles, to, columns, n, top, LOG, T, WARPS, False)


_WARPS = 16

_long = RowKernel(_long_kernel, overlaps=rows.FEW.value, registers={_WARPS: 128})
_short = RowKernel(_short_kernel, overlaps=rows.FEW.value, registers={8: 80, 16: 128})


def resident(log: bool, x: torch.Tensor, out: torch.Tensor, shape: Plan) -> Any:
    """The kernel and its launch for rows of contiguous x [rows, n]; None for other kernels."""
    count, n = x.shape
    place = place_of(x, shape)
    if place is not None:
        programs, *held = place
        static = (log, *held, _WARPS)
        return _long, (programs, (x, out), (n // shape.unit, count), static, _WARPS)
    if x.element_size() != 2 or not x.is_cuda or shape.unit == 1 or not shape.tiles:
        return None
    processors = multiprocessors(x.device.index)
    many = shape.warps == 8 and out.element_size() == 2  # not timed for results of 32 bits
    if many or (shape.warps == 16 and count <= processors):
        static = (log, shape.tiles, shape.warps)
        return _short, (count, (x, out), (n // shape.unit, processors), static, shape.warps)
    return None
