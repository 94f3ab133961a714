"""softmax and log_softmax of long 16-bit rows that a cluster holds, written in Gluon.

Each element is read once. Eight programs share a row by lanes (`cluster.py`). In each, warps of
several kinds work on different rows at a time: some find a row's range, two groups add up
exponentials, and some make the results. What takes a row's place (`row_ring.py`) is sent for by
those who need it last. For log_softmax these make the results, and a group of adders has every
other row. softmax keeps the exponentials in a ring of their own, which has room for little more
than a row; so the groups have all rows together, and those that make the results fold the sums.
Order as in `rows.py`.
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
    fold_lanes,
    hear_range,
    hear_sum,
    meet,
    open_lanes,
    open_ranges,
    share_range,
)
from batch_invariant_cuda.row_launch import Plan, RowKernel
from batch_invariant_cuda.row_ring import (
    DEPTH,
    LANES,
    SLOT,
    TILES,
    add_up,
    fits,
    numbers,
    places,
    plain,
    send_for,
    slots_of,
    tiles_of,
    where,
    wide,
)
from batch_invariant_cuda.turns import open_turns

_LEAST = 32 * rows.LANES  # columns: longer rows are held
_LOG_LEAST = 48 * rows.LANES
_SLOTS = 24  # in shared memory
_ROOM = 26  # in shared memory, beside slots of exponentials, each of which takes the room of two
_REGISTERS = 128  # of a thread, on average
_ADDER_REGISTERS = gl.constexpr(144)
_RANGER_REGISTERS = gl.constexpr(48)
_NEAR = rows.NEAR

_near_div = gluon.jit(explog.near_div.fn)
_share_div = gluon.jit(explog.share_div.fn)
_log = gluon.jit(explog.log.fn)
_term = gluon.jit(rows.term.fn)
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
def _keep(kept, slot, each, T: gl.constexpr):
    """Stores a slot of T tiles, all at a time: one after another would wait for each other."""
    for _ in gl.static_range(T, TILES):
        each = each + (each[0],)
    for _ in gl.static_range(5):  # 2^5 = TILES
        pairs = ()
        for k in gl.static_range(len(each) // 2):
            pairs = pairs + (gl.join(each[2 * k], each[2 * k + 1]),)
        each = pairs
    tiles = gl.reshape(gl.permute(each[0], [5, 4, 3, 2, 1, 0]), [TILES, WIDTH])
    kept.index(slot).store(tiles)


@gluon.jit
def _terms(slots, slot, T: gl.constexpr, within, given):
    """The exponentials of each tile of a slot, and the lanes of those of each segment."""
    top = given[0]
    kind: gl.constexpr = rows.exponential(given[1], given[2])
    held = tiles_of(slots)
    parts = ()
    each = ()
    part = gl.zeros([WIDTH], gl.float32, LINE)
    for t in gl.static_range(T):
        e = _term(held.index(slot * TILES + t).load(LINE), top, kind)
        each = each + (e,)
        part += gl.where(within, e, 0.0) if t == T - 1 else e
        if t % DEPTH == DEPTH - 1 or t == T - 1:
            parts = parts + (part,)
            part = gl.zeros([WIDTH], gl.float32, LINE)
    return each, parts


@gluon.jit
def _log_terms(slots, i, s, T: gl.constexpr, within, given):
    """For `add_up`: the lanes of the exponentials of each segment."""
    Q: gl.constexpr = given[3]
    SLOTS: gl.constexpr = given[4]
    slot, _ = where(i, s, Q, SLOTS)
    _, parts = _terms(slots, slot, T, within, given)
    return parts


@gluon.jit
def _log_adder(
    slots, ranges, totals, n, count, GROUP: gl.constexpr,
    BITS: gl.constexpr, Q: gl.constexpr, T: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Adds up the exponentials of every other row, which are there when its range is told."""
    meet()
    step = gl.num_programs(0) // cluster.PROGRAMS
    row = gl.program_id(0) // cluster.PROGRAMS + GROUP * step
    i = GROUP + 0
    while row < count:
        top, bottom = hear_range(ranges, i)
        if top - bottom < _NEAR:
            add_up(
                slots, (top, BITS, True, Q, SLOTS), n, i, 0, totals, _log_terms,
                GROUP, False, Q, T, SLOTS,
            )  # fmt: skip
        else:
            add_up(
                slots, (top, BITS, False, Q, SLOTS), n, i, 0, totals, _log_terms,
                GROUP, False, Q, T, SLOTS,
            )  # fmt: skip
        fold_lanes(totals, i)
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
        y = (numbers(v) - top) - log_total
        y = y.to(to.dtype.element_ty) if NEAR else _rounded(y, to.dtype.element_ty)
        gl.store(to + s * SLOT + to_at, y, mask=to_at < n - s * SLOT)


@gluon.jit
def _log_writer(
    x, out, slots, ready, ranges, totals, n, count, Q: gl.constexpr, SLOTS: gl.constexpr
):  # fmt: skip
    """Makes the results of row after row, and sends for the row that takes its place."""
    meet()
    at = places(wide(2, cluster.WARPS))
    to_at = places(wide(out.dtype.element_ty.primitive_bitwidth // 8, cluster.WARPS))
    row = gl.program_id(0) // cluster.PROGRAMS
    for slot in range(SLOTS):
        send_for(x, n, count, row, slot, at, slots, slot, ready, Q)
    i = 0
    while row < count:
        total = hear_sum(totals, i)
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
    """Rows of Q slots, T tiles in the last."""
    slots = gl.allocate_shared_memory(x.dtype.element_ty, [SLOTS, TILES, WIDTH], plain(2))
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=cluster.WARPS * 32)
    ranges = open_ranges()
    totals = open_lanes()
    gl.thread_barrier()
    n = n_units * 16
    BITS: gl.constexpr = out.dtype.element_ty.primitive_bitwidth
    gl.warp_specialize(
        [
            (_log_writer, (x, out, slots, ready, ranges, totals, n, count, Q, SLOTS)),
            (_ranger, (slots, ready, ranges, n, count, Q, T, SLOTS)),
            (_log_adder, (slots, ranges, totals, n, count, 0, BITS, Q, T, SLOTS)),
            (_log_adder, (slots, ranges, totals, n, count, 1, BITS, Q, T, SLOTS)),
        ],
        [cluster.WARPS, cluster.WARPS, cluster.WARPS],
        [_RANGER_REGISTERS, _ADDER_REGISTERS, _ADDER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _kept_terms(slots, i, s, T: gl.constexpr, within, given):
    """For `add_up`: the lanes of the exponentials of each segment, which are kept.

    What takes the slot's place is sent for when it has been read. There need not be room for the
    exponentials before they are made.
    """
    x, n, count, row, at, ready, kept, free = given[3]
    Q: gl.constexpr = given[4]
    SLOTS: gl.constexpr = given[5]
    KEPT: gl.constexpr = given[6]
    slot, _ = where(i, s, Q, SLOTS)
    each, parts = _terms(slots, slot, T, within, given)
    send_for(x, n, count, row, s + SLOTS, at, slots, slot, ready, Q)
    room, phase = where(i, s, Q, KEPT)
    mbarrier.wait(free.index(room), phase ^ 1)
    _keep(kept, room, each, T)
    return parts


@gluon.jit
def _adder(
    x, slots, kept, ready, free, turns, ranges, totals, n, count,
    GROUP: gl.constexpr, BITS: gl.constexpr, Q: gl.constexpr, T: gl.constexpr,
    SLOTS: gl.constexpr, KEPT: gl.constexpr,
):  # fmt: skip
    """Makes and adds up the exponentials of every other slot; sends for what takes its place."""
    meet()
    at = places(wide(2, cluster.WARPS))
    row = gl.program_id(0) // cluster.PROGRAMS
    if GROUP == 0:
        for slot in range(SLOTS):
            send_for(x, n, count, row, slot, at, slots, slot, ready, Q)
    i = 0
    while row < count:
        top, bottom = hear_range(ranges, i)
        ring = (x, n, count, row, at, ready, kept, free)
        if top - bottom < _NEAR:
            add_up(
                slots, (top, BITS, True, ring, Q, SLOTS, KEPT), n, i, turns, totals, _kept_terms,
                GROUP, True, Q, T, SLOTS,
            )  # fmt: skip
        else:
            add_up(
                slots, (top, BITS, False, ring, Q, SLOTS, KEPT), n, i, turns, totals, _kept_terms,
                GROUP, True, Q, T, SLOTS,
            )  # fmt: skip
        row += gl.num_programs(0) // cluster.PROGRAMS
        i += 1
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def _write(
    to, kept, free, n, i, to_at, total, Q: gl.constexpr, KEPT: gl.constexpr, NEAR: gl.constexpr
):
    """Stores the results of a row, slot after slot; where NEAR, none of them is NaN."""
    reciprocal = gl.div_rn(1.0, total)
    for s in range(Q):
        slot, _ = where(i, s, Q, KEPT)
        e = kept.index(slot).load(to_at.type.layout)
        gl.thread_barrier()
        mbarrier.arrive(free.index(slot))
        if to.dtype.element_ty.primitive_bitwidth == 16:
            y = e * reciprocal
        else:
            y = _near_div(e, total, reciprocal) if NEAR else _share_div(e, total, reciprocal)
        y = y.to(to.dtype.element_ty) if NEAR else _rounded(y, to.dtype.element_ty)
        gl.store(to + s * SLOT + to_at, y, mask=to_at < n - s * SLOT)


@gluon.jit
def _writer(out, kept, free, ranges, totals, n, count, Q: gl.constexpr, KEPT: gl.constexpr):
    """Makes the results of row after row."""
    meet()
    to_at = places(wide(4, cluster.WARPS))
    row = gl.program_id(0) // cluster.PROGRAMS
    i = 0
    while row < count:
        top, bottom = hear_range(ranges, i)
        fold_lanes(totals, i)
        total = hear_sum(totals, i)
        given = (out + row.to(gl.int64) * n, kept, free, n, i, to_at, total)
        if top - bottom < _NEAR:
            _write(*given, Q, KEPT, True)
        else:
            _write(*given, Q, KEPT, False)
        row += gl.num_programs(0) // cluster.PROGRAMS
        i += 1


@gluon.jit(do_not_specialize=["n_units", "count"])
def _softmax_kernel(
    x, out, n_units, count,
    Q: gl.constexpr, T: gl.constexpr, SLOTS: gl.constexpr, KEPT: gl.constexpr,
):  # fmt: skip
    """Rows of Q slots, T tiles in the last; KEPT slots for exponentials."""
    slots = gl.allocate_shared_memory(x.dtype.element_ty, [SLOTS, TILES, WIDTH], plain(2))
    kept = gl.allocate_shared_memory(gl.float32, [KEPT, TILES, WIDTH], plain(2))
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=cluster.WARPS * 32)
    free = gl.allocate_shared_memory(gl.int64, [KEPT, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(KEPT):
        mbarrier.init(free.index(slot), count=1)
    turns = open_turns()
    ranges = open_ranges()
    totals = open_lanes()
    gl.thread_barrier()
    n = n_units * 16
    BITS: gl.constexpr = out.dtype.element_ty.primitive_bitwidth
    gl.warp_specialize(
        [
            (_writer, (out, kept, free, ranges, totals, n, count, Q, KEPT)),
            (_ranger, (slots, ready, ranges, n, count, Q, T, SLOTS)),
            (_adder, (
                x, slots, kept, ready, free, turns, ranges, totals, n, count,
                0, BITS, Q, T, SLOTS, KEPT,
            )),
            (_adder, (
                x, slots, kept, ready, free, turns, ranges, totals, n, count,
                1, BITS, Q, T, SLOTS, KEPT,
            )),
        ],
        [cluster.WARPS, cluster.WARPS, cluster.WARPS],
        [_RANGER_REGISTERS, _ADDER_REGISTERS, _ADDER_REGISTERS],
    )  # fmt: skip


_options = {"registers": {cluster.WARPS.value: _REGISTERS}, "cluster": cluster.PROGRAMS.value}
kernel = RowKernel(_softmax_kernel, **_options)
log_kernel = RowKernel(_log_softmax_kernel, **_options)


def held(log: bool, n: int) -> tuple[int, ...]:
    """The constexprs of the kernel for rows of n elements.

    There is room for more than a row's exponentials where rows are short: a sum is on its way for
    as long as it takes to make those of some slots.
    """
    slots, last = slots_of(n)
    if log:
        return slots, last, _SLOTS
    kept = slots + (9 - slots) // 3
    return slots, last, _ROOM - 2 * kept, kept


def launch_of(log: bool, x: torch.Tensor, out: torch.Tensor, shape: Plan) -> Any:
    """The kernel and its launch for rows of contiguous x [rows, n]; None for other kernels."""
    count, n = x.shape
    if not fits(x, shape) or n <= (_LOG_LEAST if log else _LEAST):
        return None
    launch = (count, (x, out), (n // shape.unit, count), held(log, n), cluster.WARPS.value)
    return log_kernel if log else kernel, launch
