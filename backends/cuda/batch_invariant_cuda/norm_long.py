"""rms_norm of long 16-bit rows that a cluster holds, alone or with a residual, written in Gluon.

Each element is read once. Eight programs share a row by lanes (`cluster.py`); in each, two groups
of warps in turn add up a row's squares while others make the results of the row before it and send
for a later one in its place (`row_ring.py`). A weight of 16 bits stays in registers. Order as in
`rows.py`.
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
from batch_invariant_cuda.cluster import LINE, WIDTH, fold_lanes, hear_sum, meet, open_lanes
from batch_invariant_cuda.row_launch import Plan, RowKernel
from batch_invariant_cuda.row_ring import (
    DEPTH,
    SLOT,
    TILES,
    WARPS,
    add_up,
    copy,
    fits,
    places,
    plain,
    send_for,
    slots_of,
    tiles_of,
    where,
    wide,
)

_RSTD = reduce_ops.RSTD
_LEAST = 48 * rows.LANES  # columns: longer rows are held without a residual too
_SLOTS = 24  # in shared memory, of one ring or two
_REGISTERS = 128  # of a thread, on average
_ADDER_REGISTERS = gl.constexpr(72)

_finished = gluon.jit(reduce_ops.finished.fn)


@gluon.jit
def _squares(slots, i, s, T: gl.constexpr, within, given):
    """For `add_up`: the lanes of the squares of each segment, when the slot is filled.

    Those that take every other row see every other use of a slot. They cannot take one for the use
    before: that was told earlier, since an arrival waits for all copies a thread has begun before.
    """
    ready, slots2 = given[0], given[1]
    Q: gl.constexpr = given[2]
    SLOTS: gl.constexpr = given[3]
    SUMMED: gl.constexpr = given[4]
    slot, phase = where(i, s, Q, SLOTS)
    mbarrier.wait(ready.index(slot), phase)
    held, held2 = tiles_of(slots), tiles_of(slots2)
    parts = ()
    part = gl.zeros([WIDTH], gl.float32, LINE)
    for t in gl.static_range(T):
        v = held.index(slot * TILES + t).load(LINE).to(gl.float32)
        if SUMMED:
            v += held2.index(slot * TILES + t).load(LINE).to(gl.float32)
        v = v * v
        part += gl.where(within, v, 0.0) if t == T - 1 else v
        if t % DEPTH == DEPTH - 1 or t == T - 1:
            parts = parts + (part,)
            part = gl.zeros([WIDTH], gl.float32, LINE)
    return parts


@gluon.jit
def _adder(
    slots, slots2, ready, mailbox, n, count, GROUP: gl.constexpr,
    Q: gl.constexpr, T: gl.constexpr, SLOTS: gl.constexpr, SUMMED: gl.constexpr,
):  # fmt: skip
    """Adds up the squares of every other row, as they come."""
    meet()
    step = gl.num_programs(0) // cluster.PROGRAMS
    row = gl.program_id(0) // cluster.PROGRAMS + GROUP * step
    i = GROUP + 0
    while row < count:
        add_up(
            slots, (ready, slots2, Q, SLOTS, SUMMED), n, i, 0, mailbox, _squares,
            GROUP, False, Q, T, SLOTS,
        )  # fmt: skip
        fold_lanes(mailbox, i)
        row += 2 * step
        i += 2


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
    if SUMMED:
        copy(residual, n, count, row, s, at, slots2, slot, Q)
    send_for(x, n, count, row, s, at, slots, slot, ready, Q)


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
    at = places(wide(2, WARPS))
    row = gl.program_id(0) // cluster.PROGRAMS
    for slot in range(SLOTS):
        _send(x, residual, n, count, row, slot, at, slots, slots2, slot, ready, Q, SUMMED)
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
        total = hear_sum(mailbox, i)
        rstd = _finished(total, total, size, eps, _RSTD)
        for s in gl.static_range(Q):
            if WEIGHT and not KEPT:
                next_w = _weights(weight, (s + 1) % Q, at, n)
            slot, _ = where(i, s, Q, SLOTS)
            v = slots.index(slot).load(wide(2, WARPS)).to(gl.float32)
            if SUMMED:
                v += slots2.index(slot).load(wide(2, WARPS)).to(gl.float32)
            _send(x, residual, n, count, row, s + SLOTS, at, slots, slots2, slot, ready, Q, SUMMED)
            there = at < n - s * SLOT
            y = v * rstd
            if KEPT:
                y = _weighed(y, kept[s], to)
            elif WEIGHT:
                y = _rounded(y * w.to(gl.float32), to)
                w = next_w
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
    """Rows of Q slots, T tiles in the last.

    KEPT: the weight is kept in registers. The tensors are those of `norm_kernels`; bias and the
    statistics are not used.
    """
    ty: gl.constexpr = x.dtype.element_ty
    slots = gl.allocate_shared_memory(ty, [SLOTS, TILES, WIDTH], plain(2))
    slots2 = slots
    if SUMMED:
        slots2 = gl.allocate_shared_memory(ty, [SLOTS, TILES, WIDTH], plain(2))
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=gl.num_warps() * 32)
    mailbox = open_lanes()
    gl.thread_barrier()
    n = n_units * 16
    gl.warp_specialize(
        [
            (_writer, (
                x, residual, weight, out, total_out, slots, slots2, ready, mailbox, n, count,
                size, eps, WEIGHT, KEPT, SUMMED, Q, SLOTS,
            )),
            (_adder, (slots, slots2, ready, mailbox, n, count, 0, Q, T, SLOTS, SUMMED)),
            (_adder, (slots, slots2, ready, mailbox, n, count, 1, Q, T, SLOTS, SUMMED)),
        ],
        [cluster.WARPS, cluster.WARPS],
        [_ADDER_REGISTERS, _ADDER_REGISTERS],
    )  # fmt: skip


kernel = RowKernel(
    _rms_norm_kernel, registers={WARPS.value: _REGISTERS}, cluster=cluster.PROGRAMS.value
)


def held(
    n: int, weighted: bool, kept: bool, summed: bool
) -> tuple[bool, bool, bool, int, int, int]:
    """The constexprs of the kernel for rows of n elements."""
    slots, last = slots_of(n)
    return weighted, kept, summed, slots, last, _SLOTS // (1 + summed)


def launch_of(tensors: Sequence[torch.Tensor | None], size: float, eps: float, shape: Plan) -> Any:
    """The kernel and its launch for rows of x [rows, n], the first of `tensors`; None for others.

    That is for those that do not fit, and for short ones without a residual, which take longer.
    """
    x, residual, weight = tensors[:3]
    if x is None or not fits(x, shape):
        return None
    count, n = x.shape
    summed = residual is not None
    if n <= _LEAST and not summed:
        return None
    kept = weight is not None and weight.dtype == x.dtype
    static = held(n, weight is not None, kept, summed)
    return kernel, (count, tensors, (n // shape.unit, count, size, eps), static, WARPS.value)
