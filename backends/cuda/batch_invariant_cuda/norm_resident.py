"""rms_norm of long 16-bit rows that a cluster holds, alone or with a residual, written in Gluon.

Each element is read once. Four programs share a row by lanes (`cluster.py`); in each, some warps
add up the squares of the next row while others make this row's results and send for a later row
in its place (`row_ring.py`). A weight of 16 bits stays in registers. Order as in `rows.py`.
"""

# ruff: noqa: RUF005  (compiled by Triton, which knows less of Python)
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mbarrier

from batch_invariant_cuda import cluster, reduce_ops, rows
from batch_invariant_cuda.cluster import LINE, WIDTH, hear, meet, open_mailbox, share_lanes
from batch_invariant_cuda.row_launch import Plan, RowKernel, shared_memory
from batch_invariant_cuda.row_ring import (
    BYTES,
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

_RSTD = reduce_ops.RSTD
_MOST = 12  # slots of a row
_SLOTS = 26  # in shared memory
_REGISTERS = 168  # of a thread, on average
_ADDER_REGISTERS = gl.constexpr(88)

_finished = gluon.jit(reduce_ops.finished.fn)


@gluon.jit
def _squares(held, held2, first, T: gl.constexpr, within, SUMMED: gl.constexpr):
    """The lanes of T tiles of a segment from `first` on; of the last one those that are within."""
    part = gl.zeros([WIDTH], gl.float32, LINE)
    for t in gl.static_range(T):
        v = held.index(first + t).load(LINE).to(gl.float32)
        if SUMMED:
            v += held2.index(first + t).load(LINE).to(gl.float32)
        v = v * v
        if t == T - 1:
            v = gl.where(within, v, 0.0)
        part += v
    return part


@gluon.jit
def _adder(
    slots, slots2, ready, mailbox, n, count,
    Q: gl.constexpr, T: gl.constexpr, SLOTS: gl.constexpr, SUMMED: gl.constexpr,
):  # fmt: skip
    """Adds up the squares of row after row, as they come."""
    meet()
    held, held2 = tiles_of(slots, SLOTS), tiles_of(slots2, SLOTS)
    all_within = gl.full([WIDTH], True, gl.int1, LINE)
    within = ends(n, Q, T)
    row = gl.program_id(0) // cluster.PROGRAMS
    i = 0
    while row < count:
        lanes = gl.zeros([WIDTH], gl.float32, LINE)
        for s in range(Q - 1):
            slot, phase = where(i, s, Q, SLOTS)
            mbarrier.wait(ready.index(slot), phase)
            for half in gl.static_range(TILES // DEPTH):
                first = slot * TILES + half * DEPTH
                lanes += _squares(held, held2, first, DEPTH, all_within, SUMMED)
        slot, phase = where(i, Q - 1, Q, SLOTS)
        mbarrier.wait(ready.index(slot), phase)
        first = slot * TILES
        if T > DEPTH:
            lanes += _squares(held, held2, first, DEPTH, all_within, SUMMED)
            lanes += _squares(held, held2, first + DEPTH, T - DEPTH, within, SUMMED)
        else:
            lanes += _squares(held, held2, first, T, within, SUMMED)
        share_lanes(lanes, mailbox, i)
        row += gl.num_programs(0) // cluster.PROGRAMS
        i += 1


@gluon.constexpr_function
def _rounding(dtype, low, high, to):
    kind, payload = ("bf16x2", "0x003f003f") if dtype == gl.bfloat16 else ("f16x2", "0x01ff01ff")
    return (
        f"{{ .reg .b32 y, nan; cvt.rn.{kind}.f32 y, {high}, {low}; set.neu.u32.{kind} nan, y, y;"
        f" lop3.b32 {to}, y, nan, {payload}, 0x70; }}"  # y & ~(nan & payload)
    )


@gluon.jit
def _rounded(x, to):
    """`rows.rounded` to the 16 bits that the pointer `to` points at, of pairs, in few instructions.

    A NaN comes from the conversion with all bits of its payload set, but for the sign. It needs
    compute capability 9.0, as clusters do.
    """
    steps: gl.constexpr = _rounding(to.dtype.element_ty, "$1", "$2", "$0")
    return gl.inline_asm_elementwise(steps, "=r,f,f", [x], to.dtype.element_ty, True, 2)


@gluon.constexpr_function
def _weighing(dtype):
    if dtype == gl.bfloat16:
        widening = "shl.b32 w0, $3, 16; and.b32 w1, $3, 0xffff0000;"
    else:
        widening = "mov.b32 {h0, h1}, $3; cvt.f32.f16 w0, h0; cvt.f32.f16 w1, h1;"
    return (
        f"{{ .reg .f32 w0, w1; .reg .b16 h0, h1; {widening}"
        " mul.rn.f32 w0, $1, w0; mul.rn.f32 w1, $2, w1; "
    ) + (_rounding(dtype, "w0", "w1", "$0") + "}")


@gluon.jit
def _weighed(y, weight, to):
    """y * weight as `_rounded`.

    Said to have side effects: or else the weight would be made wider before the first row, once
    and for all, and need twice the registers.
    """
    steps: gl.constexpr = _weighing(to.dtype.element_ty)
    return gl.inline_asm_elementwise(steps, "=r,f,f,r", [y, weight], to.dtype.element_ty, False, 2)


@gluon.jit
def _send(
    x, residual, n, count, row, s, at, slots, slots2, slot, ready,
    Q: gl.constexpr, SUMMED: gl.constexpr,
):  # fmt: skip
    send_for(x, n, count, row, s, at, slots, slot, Q)
    if SUMMED:
        send_for(residual, n, count, row, s, at, slots2, slot, Q)
    async_copy.mbarrier_arrive(ready.index(slot), increment_count=False)


@gluon.jit
def _weights(weight, s, at, n):
    return gl.load(weight + s * SLOT + at, mask=at < n - s * SLOT, other=0.0)


@gluon.jit
def _writer(
    x, residual, weight, out, total_out, slots, slots2, ready, mailbox, n, count, size, eps,
    WEIGHT: gl.constexpr, KEPT: gl.constexpr, SUMMED: gl.constexpr,
    Q: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Makes the results of row after row, and sends for the row that takes its place."""
    meet()
    at = places(wide(2))
    row = gl.program_id(0) // cluster.PROGRAMS
    for first in gl.static_range(SLOTS):
        _send(x, residual, n, count, row, first, at, slots, slots2, first, ready, Q, SUMMED)
    kept = ()
    if KEPT:
        for s in gl.static_range(Q):
            kept = kept + (_weights(weight, s, at, n),)
    elif WEIGHT:
        w = _weights(weight, 0, at, n)
    i = 0
    while row < count:
        to = out + row.to(gl.int64) * n
        total_to = total_out
        if SUMMED:
            total_to = total_out + row.to(gl.int64) * n
        total, _ = hear(mailbox, i)
        rstd = _finished(total, total, size, eps, _RSTD)
        for s in gl.static_range(Q):
            if WEIGHT and not KEPT:
                following = _weights(weight, (s + 1) % Q, at, n)
            slot, _ = where(i, s, Q, SLOTS)
            v = slots.index(slot).load(wide(2)).to(gl.float32)
            if SUMMED:
                v += slots2.index(slot).load(wide(2)).to(gl.float32)
            _send(x, residual, n, count, row, s + SLOTS, at, slots, slots2, slot, ready, Q, SUMMED)
            there = at < n - s * SLOT
            y = v * rstd
            if KEPT:
                y = _weighed(y, kept[s], to)
            elif WEIGHT:
                y = _rounded(y * w.to(gl.float32), to)
                w = following
            else:
                y = _rounded(y, to)
            if s < Q - 1:
                gl.store(to + s * SLOT + at, y)
            else:
                gl.store(to + s * SLOT + at, y, mask=there)
            if SUMMED:
                if s < Q - 1:
                    gl.store(total_to + s * SLOT + at, _rounded(v, total_to))
                else:
                    gl.store(total_to + s * SLOT + at, _rounded(v, total_to), mask=there)
        row += gl.num_programs(0) // cluster.PROGRAMS
        i += 1
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["n_units", "count", "size", "eps"])
def _rms_norm_kernel(
    x,
    residual,
    weight,
    bias,
    out,
    total_out,
    mean_out,
    rstd_out,
    n_units,
    count,
    size,
    eps,
    WEIGHT: gl.constexpr,
    KEPT: gl.constexpr,
    SUMMED: gl.constexpr,
    Q: gl.constexpr,
    T: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """Rows of Q slots, T tiles in the last, of SLOTS < 3 Q; KEPT: the weight is, in registers.

    So a row is not complete before results of the last row but one are made: what is told of two
    rows in turn has been heard by all when it is told anew. The tensors are those of
    `norm_kernels`; bias and the statistics are not used.
    """
    ty: gl.constexpr = x.dtype.element_ty
    slots = gl.allocate_shared_memory(ty, [SLOTS, TILES, WIDTH], plain(2))
    slots2 = slots
    if SUMMED:
        slots2 = gl.allocate_shared_memory(ty, [SLOTS, TILES, WIDTH], plain(2))
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=gl.num_warps() * 32)
    mailbox = open_mailbox()
    gl.thread_barrier()
    n = n_units * 16
    gl.warp_specialize(
        [
            (_writer, (
                x, residual, weight, out, total_out, slots, slots2, ready, mailbox, n, count,
                size, eps, WEIGHT, KEPT, SUMMED, Q, SLOTS,
            )),
            (_adder, (slots, slots2, ready, mailbox, n, count, Q, T, SLOTS, SUMMED)),
        ],
        [cluster.WARPS],
        [_ADDER_REGISTERS],
    )  # fmt: skip


kernel = RowKernel(_rms_norm_kernel, registers={WARPS: _REGISTERS}, cluster=4)


def held(
    n: int, weighted: bool, kept: bool, summed: bool
) -> tuple[bool, bool, bool, int, int, int]:
    """The constexprs of the kernel for rows of n elements."""
    slots, last = slots_of(n)
    return weighted, kept, summed, slots, last, min(3 * slots - 1, _SLOTS // (1 + summed))


def _worth(count: int, n: int, summed: bool, shape: Plan) -> bool:
    """Whether it is faster than the other kernels: as measured on an H200."""
    if summed:
        return n > (16 if shape.split else 32) * rows.LANES
    return n > 64 * rows.LANES and count >= 8


def resident(tensors: Sequence[torch.Tensor | None], size: float, eps: float, shape: Plan) -> Any:
    """The kernel and its launch for rows of x [rows, n], the first of `tensors`; None for others.

    There must be room for the rows, and they must be worth it.
    """
    x, residual, weight = tensors[:3]
    if x is None or x.element_size() != 2 or not x.is_cuda or shape.tiles or shape.unit == 1:
        return None
    count, n = x.shape
    summed = residual is not None
    kept = weight is not None and weight.dtype == x.dtype
    static = held(n, weight is not None, kept, summed)
    room = shared_memory(x.device.index) >= _SLOTS * (BYTES + 8) + cluster.MAILBOX
    if not room or slots_of(n)[0] > _MOST or not _worth(count, n, summed, shape):
        return None
    return kernel, (count, tensors, (n // shape.unit, count, size, eps), static, WARPS)
