"""softmax and log_softmax of long 16-bit rows that a cluster holds, written in Gluon.

Each element is read once. Eight programs share a row by lanes (`cluster.py`). In each, warps of
several kinds work on different rows at a time: some find a row's range, two groups in turn add up
a row's exponentials, and some make the results. What takes a row's place (`row_ring.py`) is sent
for by those who need it last: for softmax, which keeps the exponentials in a ring of their own,
by those who make them. Order as in `rows.py`.
"""

# ruff: noqa: RUF005  (compiled by Triton, which knows less of Python)
from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mbarrier

from batch_invariant_cuda import cluster, explog, rows
from batch_invariant_cuda.cluster import (
    LINE,
    PAIRS,
    WIDTH,
    hear_range,
    hear_sum,
    meet,
    open_lanes,
    open_ranges,
    share_lanes,
    share_range,
)
from batch_invariant_cuda.row_launch import Plan, RowKernel
from batch_invariant_cuda.row_ring import (
    DEPTH,
    LANES,
    SLOT,
    TILES,
    WARPS,
    fits,
    lanes_of,
    most_slots,
    nothing,
    places,
    plain,
    send_for,
    slots_of,
    tiles_of,
    where,
    wide,
)

_LEAST = 32 * rows.LANES  # columns: longer rows are held
_LOG_LEAST = 48 * rows.LANES
_SLOTS = 24  # in shared memory
_PAIRED_SLOTS = 8  # in shared memory, beside as many of exponentials
_REGISTERS = gl.constexpr(96)
_NEAR = rows.NEAR

_exp = gluon.jit(explog.exp.fn)
_near_div = gluon.jit(explog.near_div.fn)
_near_exp = gluon.jit(explog.near_exp.fn)
_share_div = gluon.jit(explog.share_div.fn)
_log = gluon.jit(explog.log.fn)
_rounded = gluon.jit(rows.rounded.fn)
_wider = gluon.jit(rows.wider.fn)


@gluon.jit
def _ranger(slots, ready, ranges, n, count, Q: gl.constexpr, T: gl.constexpr, SLOTS: gl.constexpr):
    """Finds the range of row after row, as they come, in pairs of tiles."""
    meet()
    ty: gl.constexpr = slots.dtype
    pairs: gl.constexpr = TILES // 2
    held = slots._reinterpret(ty, [SLOTS * pairs, 2 * WIDTH], plain(1))
    each = gl.arange(0, 2 * WIDTH, PAIRS)
    at = each // WIDTH * LANES + each % WIDTH + gl.program_id(0) % cluster.PROGRAMS * WIDTH
    last: gl.constexpr = (T - 1) // 2
    within = at < n - ((Q - 1) * TILES + last * 2) * LANES
    row = gl.program_id(0) // cluster.PROGRAMS
    i = 0
    while row < count:
        top = gl.full([2 * WIDTH], float("-inf"), ty, PAIRS)
        bottom = gl.full([2 * WIDTH], float("inf"), ty, PAIRS)
        for s in range(Q - 1):
            slot, phase = where(i, s, Q, SLOTS)
            mbarrier.wait(ready.index(slot), phase)
            for pair in gl.static_range(pairs):
                top, bottom = _wider(top, bottom, held.index(slot * pairs + pair).load(PAIRS))
        slot, phase = where(i, Q - 1, Q, SLOTS)
        mbarrier.wait(ready.index(slot), phase)
        for pair in gl.static_range(last):
            top, bottom = _wider(top, bottom, held.index(slot * pairs + pair).load(PAIRS))
        v = held.index(slot * pairs + last).load(PAIRS)
        top, bottom = _wider(top, bottom, gl.where(within, v, top))
        share_range(top.to(gl.float32), bottom.to(gl.float32), ranges, i)
        row += gl.num_programs(0) // cluster.PROGRAMS
        i += 1


@gluon.jit
def _keep(kept, segment, each, T: gl.constexpr):
    """Stores T tiles of a segment, all at a time: one after another would wait for each other."""
    for _ in gl.static_range(T, DEPTH):
        each = each + (each[0],)
    pairs = (gl.join(each[0], each[1]), gl.join(each[2], each[3]))
    pairs = pairs + (gl.join(each[4], each[5]), gl.join(each[6], each[7]))
    tiles = gl.join(gl.join(pairs[0], pairs[1]), gl.join(pairs[2], pairs[3]))
    tiles = gl.reshape(gl.permute(tiles, [3, 2, 1, 0]), [DEPTH, WIDTH])
    shape: gl.constexpr = [kept.shape[0] * TILES // DEPTH, DEPTH, WIDTH]
    kept._reinterpret(kept.dtype, shape, plain(2)).index(segment).store(tiles)


@gluon.jit
def _part(slots, kept, first, T: gl.constexpr, within, given):
    """The lanes of T exponentials of a segment; kept, if there is a ring for them."""
    top = given[0]
    NEAR: gl.constexpr = given[1]
    held = tiles_of(slots)
    part = gl.zeros([WIDTH], gl.float32, LINE)
    each = ()
    for t in gl.static_range(T):
        v = held.index(first + t).load(LINE).to(gl.float32) - top
        e = _near_exp(v) if NEAR else _exp(v, True)
        each = each + (e,)
        part += gl.where(within, e, 0.0) if t == T - 1 else e
    if kept.dtype == gl.float32:
        _keep(kept, first // DEPTH, each, T)
    return part


@gluon.jit
def _log_adder(
    slots, ready, ranges, totals, n, count, FIRST: gl.constexpr,
    Q: gl.constexpr, T: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Adds up the exponentials of every other row."""
    meet()
    step = gl.num_programs(0) // cluster.PROGRAMS
    row = gl.program_id(0) // cluster.PROGRAMS + FIRST * step
    i = FIRST + 0
    while row < count:
        top, bottom = hear_range(ranges, i)
        if top - bottom < _NEAR:
            lanes = lanes_of(slots, slots, ready, (top, True), n, i, _part, nothing, Q, T, SLOTS)
        else:
            lanes = lanes_of(slots, slots, ready, (top, False), n, i, _part, nothing, Q, T, SLOTS)
        share_lanes(lanes, totals, i, 0.0)
        row += 2 * step
        i += 2


@gluon.jit
def _log_write(
    x, to, slots, ready, n, count, row, i, at, to_at, top, log_total,
    Q: gl.constexpr, SLOTS: gl.constexpr, NEAR: gl.constexpr,
):  # fmt: skip
    """Stores the results of a row, slot after slot; where NEAR, none of them is NaN."""
    for s in range(Q):
        slot, _ = where(i, s, Q, SLOTS)
        v = slots.index(slot).load(to_at.type.layout)
        send_for(x, n, count, row, s + SLOTS, at, slots, slot, ready, Q)
        y = (v.to(gl.float32) - top) - log_total
        y = y.to(to.dtype.element_ty) if NEAR else _rounded(y, to.dtype.element_ty)
        gl.store(to + s * SLOT + to_at, y, mask=to_at < n - s * SLOT)


@gluon.jit
def _log_writer(
    x, out, slots, ready, ranges, totals, n, count, Q: gl.constexpr, SLOTS: gl.constexpr
):  # fmt: skip
    """Makes the results of row after row, and sends for the row that takes its place."""
    meet()
    at = places(wide(2, WARPS))
    to_at = places(wide(out.dtype.element_ty.primitive_bitwidth // 8, WARPS))
    row = gl.program_id(0) // cluster.PROGRAMS
    for slot in range(SLOTS):
        send_for(x, n, count, row, slot, at, slots, slot, ready, Q)
    i = 0
    while row < count:
        total, _ = hear_sum(totals, i)
        top, bottom = hear_range(ranges, i)
        to = out + row.to(gl.int64) * n
        given = (x, to, slots, ready, n, count, row, i, at, to_at, top, _log(total))
        if top - bottom < _NEAR:
            _log_write(*given, Q, SLOTS, True)
        else:
            _log_write(*given, Q, SLOTS, False)
        row += gl.num_programs(0) // cluster.PROGRAMS
        i += 1
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["n_units", "count"])
def _log_softmax_kernel(
    x, out, n_units, count, Q: gl.constexpr, T: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Rows of Q slots, T tiles in the last, of no more than `most_slots`."""
    slots = gl.allocate_shared_memory(x.dtype.element_ty, [SLOTS, TILES, WIDTH], plain(2))
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=WARPS * 32)
    ranges = open_ranges()
    totals = open_lanes()
    gl.thread_barrier()
    n = n_units * 16
    gl.warp_specialize(
        [
            (_log_writer, (x, out, slots, ready, ranges, totals, n, count, Q, SLOTS)),
            (_ranger, (slots, ready, ranges, n, count, Q, T, SLOTS)),
            (_log_adder, (slots, ready, ranges, totals, n, count, 0, Q, T, SLOTS)),
            (_log_adder, (slots, ready, ranges, totals, n, count, 1, Q, T, SLOTS)),
        ],
        [cluster.WARPS, cluster.WARPS, cluster.WARPS],
        [_REGISTERS, _REGISTERS, _REGISTERS],
    )  # fmt: skip


@gluon.jit
def _send_for_next(i, s, slot, given):
    """For `lanes_of`: all have read what is in the slot."""
    x, n, count, row, at, slots, ready, SLOTS, Q = given[2]
    send_for(x, n, count, row, s + SLOTS, at, slots, slot, ready, Q)


@gluon.jit
def _adder(
    x, slots, kept, ready, free, ranges, totals, n, count, FIRST: gl.constexpr,
    Q: gl.constexpr, T: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Makes and adds up the exponentials of every other row, and sends for what takes its place."""
    meet()
    at = places(wide(2, cluster.WARPS))
    step = gl.num_programs(0) // cluster.PROGRAMS
    row = gl.program_id(0) // cluster.PROGRAMS
    if FIRST == 0:
        for slot in range(SLOTS):
            send_for(x, n, count, row, slot, at, slots, slot, ready, Q)
    row += FIRST * step
    i = FIRST + 0
    while row < count:
        top, bottom = hear_range(ranges, i)
        later = (x, n, count, row, at, slots, ready, SLOTS, Q)
        if top - bottom < _NEAR:
            lanes = lanes_of(
                slots, kept, free, (top, True, later), n, i, _part, _send_for_next, Q, T, SLOTS, 1
            )
        else:
            lanes = lanes_of(
                slots, kept, free, (top, False, later), n, i, _part, _send_for_next, Q, T, SLOTS, 1
            )
        share_lanes(lanes, totals, i, top - bottom)
        row += 2 * step
        i += 2
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def _write(
    to, kept, free, n, i, to_at, total, Q: gl.constexpr, SLOTS: gl.constexpr, NEAR: gl.constexpr
):
    """Stores the results of a row, slot after slot; where NEAR, none of them is NaN."""
    reciprocal = gl.div_rn(1.0, total)
    for s in range(Q):
        slot, _ = where(i, s, Q, SLOTS)
        e = kept.index(slot).load(to_at.type.layout)
        gl.thread_barrier()
        mbarrier.arrive(free.index(slot))
        if NEAR:
            y = _near_div(e, total, reciprocal).to(to.dtype.element_ty)
        else:
            y = _rounded(_share_div(e, total, reciprocal), to.dtype.element_ty)
        gl.store(to + s * SLOT + to_at, y, mask=to_at < n - s * SLOT)


@gluon.jit
def _writer(out, kept, free, totals, n, count, Q: gl.constexpr, SLOTS: gl.constexpr):
    """Makes the results of row after row."""
    meet()
    to_at = places(wide(out.dtype.element_ty.primitive_bitwidth // 8, WARPS))
    row = gl.program_id(0) // cluster.PROGRAMS
    i = 0
    while row < count:
        total, width = hear_sum(totals, i)
        given = (out + row.to(gl.int64) * n, kept, free, n, i, to_at, total)
        if width < _NEAR:
            _write(*given, Q, SLOTS, True)
        else:
            _write(*given, Q, SLOTS, False)
        row += gl.num_programs(0) // cluster.PROGRAMS
        i += 1


@gluon.jit(do_not_specialize=["n_units", "count"])
def _softmax_kernel(
    x, out, n_units, count, Q: gl.constexpr, T: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Rows of Q slots, T tiles in the last, of SLOTS < 3 Q.

    So a group of adders is at most two rows behind the other, and no range or sum is told before
    all have heard the one that had its turn before it.
    """
    shape: gl.constexpr = [SLOTS, TILES, WIDTH]
    slots = gl.allocate_shared_memory(x.dtype.element_ty, shape, plain(2))
    kept = gl.allocate_shared_memory(gl.float32, shape, plain(2))
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=cluster.WARPS * 32)
        mbarrier.init(free.index(slot), count=1)
    ranges = open_ranges()
    totals = open_lanes()
    gl.thread_barrier()
    n = n_units * 16
    gl.warp_specialize(
        [
            (_writer, (out, kept, free, totals, n, count, Q, SLOTS)),
            (_ranger, (slots, ready, ranges, n, count, Q, T, SLOTS)),
            (_adder, (x, slots, kept, ready, free, ranges, totals, n, count, 0, Q, T, SLOTS)),
            (_adder, (x, slots, kept, ready, free, ranges, totals, n, count, 1, Q, T, SLOTS)),
        ],
        [cluster.WARPS, cluster.WARPS, cluster.WARPS],
        [_REGISTERS, _REGISTERS, _REGISTERS],
    )  # fmt: skip


_options = {"registers": {WARPS.value: _REGISTERS.value}, "cluster": cluster.PROGRAMS.value}
kernel = RowKernel(_softmax_kernel, **_options)
log_kernel = RowKernel(_log_softmax_kernel, **_options)


def held(log: bool, n: int) -> tuple[int, int, int]:
    """The constexprs of the kernel for rows of n elements."""
    slots, last = slots_of(n)
    most = min(_SLOTS, most_slots(slots)) if log else min(_PAIRED_SLOTS, 3 * slots - 1)
    return slots, last, most


def launch_of(log: bool, x: torch.Tensor, out: torch.Tensor, shape: Plan) -> Any:
    """The kernel and its launch for rows of contiguous x [rows, n]; None for other kernels."""
    count, n = x.shape
    if not fits(x, shape) or n <= (_LOG_LEAST if log else _LEAST):
        return None
    launch = (count, (x, out), (n // shape.unit, count), held(log, n), WARPS.value)
    return log_kernel if log else kernel, launch
