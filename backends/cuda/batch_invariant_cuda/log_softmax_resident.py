"""log_softmax of long 16-bit rows that a cluster holds, written in Gluon.

Each element is read once. Four programs share a row by lanes (`cluster.py`). In each, warps of
several kinds work on different rows at a time: some find a row's range, some add up exponentials,
in three groups that take segments in turn, and some make the results and send for a later row in
its place (`row_ring.py`). Order as in `rows.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mbarrier

from batch_invariant_cuda import cluster, explog, rows
from batch_invariant_cuda.cluster import (
    LINE,
    WIDTH,
    hear,
    meet,
    open_mailbox,
    share_lanes,
    share_range,
)
from batch_invariant_cuda.row_launch import Plan, RowKernel, shared_memory
from batch_invariant_cuda.row_ring import (
    DEPTH,
    SLOT,
    TILES,
    WARPS,
    ends,
    places,
    plain,
    send_for,
    slots_of,
    tiles_of,
    where,
    wide,
)

_LEAST = 65537  # columns of a row that is held
_FEWEST = 8  # rows; segments of fewer are better spread over more programs
_MOST = 12  # slots of a row
_SLOTS = 24  # in shared memory; with more on their way, reading took longer
_ADDERS = gl.constexpr(3)
_REGISTERS = gl.constexpr(80)
_NEAR = rows.NEAR

_exp = gluon.jit(explog.exp.fn)
_near_exp = gluon.jit(explog.near_exp.fn)
_log = gluon.jit(explog.log.fn)
_rounded = gluon.jit(rows.rounded.fn)
_wider = gluon.jit(rows.wider.fn)


@gluon.jit
def _range_of_tiles(held, first, T: gl.constexpr, within, top, bottom):
    """The widest range of T tiles from `first` on; of the last one of those that are within."""
    for t in gl.static_range(T):
        v = held.index(first + t).load(LINE)
        if t == T - 1:
            v = gl.where(within, v, top)
        top, bottom = _wider(top, bottom, v)
    return top, bottom


@gluon.jit
def _ranger(slots, ready, ranges, n, count, Q: gl.constexpr, T: gl.constexpr, SLOTS: gl.constexpr):
    """Finds the range of row after row, as they come."""
    meet()
    ty: gl.constexpr = slots.dtype
    held = tiles_of(slots, SLOTS)
    all_within = gl.full([WIDTH], True, gl.int1, LINE)
    within = ends(n, Q, T)
    row = gl.program_id(0) // cluster.PROGRAMS
    i = 0
    while row < count:
        top = gl.full([WIDTH], float("-inf"), ty, LINE)
        bottom = gl.full([WIDTH], float("inf"), ty, LINE)
        for s in range(Q - 1):
            slot, phase = where(i, s, Q, SLOTS)
            mbarrier.wait(ready.index(slot), phase)
            top, bottom = _range_of_tiles(held, slot * TILES, TILES, all_within, top, bottom)
        slot, phase = where(i, Q - 1, Q, SLOTS)
        mbarrier.wait(ready.index(slot), phase)
        top, bottom = _range_of_tiles(held, slot * TILES, T, within, top, bottom)
        share_range(top.to(gl.float32), bottom.to(gl.float32), ranges, i)
        row += gl.num_programs(0) // cluster.PROGRAMS
        i += 1


@gluon.jit
def _segment(held, first, T: gl.constexpr, top, within, NEAR: gl.constexpr):
    """The lanes of the exponentials of T tiles of a segment; of the last one of those within."""
    part = gl.zeros([WIDTH], gl.float32, LINE)
    for t in gl.static_range(T):
        v = held.index(first + t).load(LINE).to(gl.float32) - top
        e = _near_exp(v) if NEAR else _exp(v, True)
        if t == T - 1:
            e = gl.where(within, e, 0.0)
        part += e
    return part


@gluon.constexpr_function
def _segments(Q, T):
    return -(-((Q - 1) * TILES.value + T) // DEPTH.value)


@gluon.constexpr_function
def _passes(adder, segments):
    """How often an adder passes lanes on in a row."""
    return len(range(adder, segments - 1, _ADDERS.value))


@gluon.jit
def _after(part, passing, passed, i, p, ADDER: gl.constexpr, SEGMENTS: gl.constexpr):
    """The lanes of segment p, added to those that the adder of the one before has passed on."""
    lanes = gl.zeros([WIDTH], gl.float32, LINE)
    if p > 0:
        before: gl.constexpr = (ADDER + _ADDERS - 1) % _ADDERS
        turn = i * _passes(before, SEGMENTS) + (p - 1) // _ADDERS
        mbarrier.wait(passed.index(before * 2 + turn % 2), turn // 2 & 1)
        lanes = passing.index(before * 2 + turn % 2).load(LINE)
    return lanes + part


@gluon.jit
def _lanes(
    held, i, top, within, passing, passed, ADDER: gl.constexpr,
    Q: gl.constexpr, T: gl.constexpr, SLOTS: gl.constexpr, NEAR: gl.constexpr,
):  # fmt: skip
    """Adds an adder's segments to a row's lanes and passes them on, but for the last segment."""
    segments: gl.constexpr = _segments(Q, T)
    all_within = gl.full([WIDTH], True, gl.int1, LINE)
    lanes = gl.zeros([WIDTH], gl.float32, LINE)
    for p in range(ADDER, segments - 1, _ADDERS):
        slot, _ = where(i, p * DEPTH // TILES, Q, SLOTS)
        first = slot * TILES + p * DEPTH % TILES
        part = _segment(held, first, DEPTH, top, all_within, NEAR)
        turn = i * _passes(ADDER, segments) + p // _ADDERS
        passing.index(ADDER * 2 + turn % 2).store(
            _after(part, passing, passed, i, p, ADDER, segments)
        )
        mbarrier.arrive(passed.index(ADDER * 2 + turn % 2))
    if (segments - 1) % _ADDERS == ADDER:
        slot, _ = where(i, Q - 1, Q, SLOTS)
        done: gl.constexpr = (segments - 1) * DEPTH % TILES
        part = _segment(held, slot * TILES + done, T - done, top, within, NEAR)
        lanes = _after(part, passing, passed, i, segments - 1, ADDER, segments)
    return lanes


@gluon.jit
def _adder(
    slots, told, n, count, ADDER: gl.constexpr,
    Q: gl.constexpr, T: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Adds up the exponentials of every third segment of row after row."""
    meet()
    ranges, totals, passing, passed = told
    held = tiles_of(slots, SLOTS)
    within = ends(n, Q, T)
    row = gl.program_id(0) // cluster.PROGRAMS
    i = 0
    while row < count:
        top, bottom = hear(ranges, i)
        lanes = gl.zeros([WIDTH], gl.float32, LINE)
        if top - bottom < _NEAR:
            lanes = _lanes(held, i, top, within, passing, passed, ADDER, Q, T, SLOTS, True)
        else:
            lanes = _lanes(held, i, top, within, passing, passed, ADDER, Q, T, SLOTS, False)
        if (_segments(Q, T) - 1) % _ADDERS == ADDER:
            share_lanes(lanes, totals, i)
        row += gl.num_programs(0) // cluster.PROGRAMS
        i += 1


@gluon.jit
def _send(x, n, count, row, s, at, slots, slot, ready, Q: gl.constexpr):
    send_for(x, n, count, row, s, at, slots, slot, Q)
    async_copy.mbarrier_arrive(ready.index(slot), increment_count=False)


@gluon.jit
def _write(
    x, to, slots, ready, n, count, row, i, at, to_at, top, log_total,
    Q: gl.constexpr, SLOTS: gl.constexpr, NEAR: gl.constexpr,
):  # fmt: skip
    """Stores the results of a row, slot after slot; where NEAR, none of them is NaN."""
    for s in range(Q):
        slot, _ = where(i, s, Q, SLOTS)
        v = slots.index(slot).load(to_at.type.layout)
        _send(x, n, count, row, s + SLOTS, at, slots, slot, ready, Q)
        y = (v.to(gl.float32) - top) - log_total
        y = y.to(to.dtype.element_ty) if NEAR else _rounded(y, to.dtype.element_ty)
        gl.store(to + s * SLOT + to_at, y, mask=to_at < n - s * SLOT)


@gluon.jit
def _writer(x, out, slots, ready, ranges, totals, n, count, Q: gl.constexpr, SLOTS: gl.constexpr):
    """Makes the results of row after row, and sends for the row that takes its place."""
    meet()
    at = places(wide(2))
    to_at = places(wide(out.dtype.element_ty.primitive_bitwidth // 8))
    row = gl.program_id(0) // cluster.PROGRAMS
    for slot in range(SLOTS):
        _send(x, n, count, row, slot, at, slots, slot, ready, Q)
    i = 0
    while row < count:
        total, _ = hear(totals, i)
        top, bottom = hear(ranges, i)
        log_total = _log(total)
        to = out + row.to(gl.int64) * n
        given = (x, to, slots, ready, n, count, row, i, at, to_at, top, log_total)
        if top - bottom < _NEAR:
            _write(*given, Q, SLOTS, True)
        else:
            _write(*given, Q, SLOTS, False)
        row += gl.num_programs(0) // cluster.PROGRAMS
        i += 1
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["n_units", "count"])
def _log_softmax_kernel(
    x, out, n_units, count, Q: gl.constexpr, T: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Rows of Q slots, T tiles in the last, of SLOTS < 3 Q.

    So a row is not complete before results of the last row but one are made: what is told of two
    rows in turn has been heard by all when it is told anew.
    """
    ty: gl.constexpr = x.dtype.element_ty
    turns: gl.constexpr = _ADDERS * 2
    slots = gl.allocate_shared_memory(ty, [SLOTS, TILES, WIDTH], plain(2))
    passing = gl.allocate_shared_memory(gl.float32, [turns, WIDTH], plain(1))
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    passed = gl.allocate_shared_memory(gl.int64, [turns, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=gl.num_warps() * 32)
    for turn in gl.static_range(turns):
        mbarrier.init(passed.index(turn), count=1)
    ranges = open_mailbox()
    totals = open_mailbox()
    gl.thread_barrier()
    n = n_units * 16
    told = (ranges, totals, passing, passed)
    gl.warp_specialize(
        [
            (_writer, (x, out, slots, ready, ranges, totals, n, count, Q, SLOTS)),
            (_ranger, (slots, ready, ranges, n, count, Q, T, SLOTS)),
            (_adder, (slots, told, n, count, 0, Q, T, SLOTS)),
            (_adder, (slots, told, n, count, 1, Q, T, SLOTS)),
            (_adder, (slots, told, n, count, 2, Q, T, SLOTS)),
        ],
        [cluster.WARPS, cluster.WARPS, cluster.WARPS, cluster.WARPS],
        [_REGISTERS, _REGISTERS, _REGISTERS, _REGISTERS],
    )  # fmt: skip


kernel = RowKernel(_log_softmax_kernel, registers={WARPS: _REGISTERS.value}, cluster=4)


def held(n: int) -> tuple[int, int, int]:
    """The constexprs of the kernel for rows of n elements."""
    slots, last = slots_of(n)
    return slots, last, min(_SLOTS, 3 * slots - 1)


def resident(x: torch.Tensor, out: torch.Tensor, shape: Plan) -> Any:
    """The kernel and its launch for rows of contiguous x [rows, n]; None for other kernels."""
    count, n = x.shape
    if x.element_size() != 2 or not x.is_cuda or shape.unit == 1:
        return None
    room = shared_memory(x.device.index) >= 227 << 10
    if not room or n < _LEAST or count < _FEWEST or slots_of(n)[0] > _MOST:
        return None
    return kernel, (count, (x, out), (n // shape.unit, count), held(n), WARPS)
