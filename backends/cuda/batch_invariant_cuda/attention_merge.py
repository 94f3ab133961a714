"""Blocks of keys put together: a row's state, its result, and rows from blocks left in memory."""

# ruff: noqa: RUF005  (compiled by Triton, which knows less of Python)
from __future__ import annotations

import triton
import triton.language as tl

from batch_invariant_cuda.row_launch import RowKernel
from batch_invariant_cuda.rows import FEW, take_turn

BLOCK = 128  # keys
LOG2_E = tl.constexpr(1.4426950408889634)

_BLOCK = tl.constexpr(BLOCK)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def merge(top, total, acc, next_top, next_total, next_acc):
    """Two runs of keys as one, the second behind the first: [BM], [BM] and [BM, DV] of each."""
    highest = tl.maximum(top, next_top)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    shrink, share = tl.exp2(top - base), tl.exp2(next_top - base)
    total = tl.fma(next_total, share, total * shrink)
    acc = tl.fma(next_acc, tl.broadcast_to(share[:, None], acc.shape), acc * shrink[:, None])
    return highest, total, acc


@triton.jit
def finish(top, total, acc):
    """Results [BM, DV] and log-sum-exp [BM]; 0 and -inf for rows that attend to no key."""
    none = total == 0.0
    share = tl.div_rn(1.0, tl.where(none, 1.0, total))
    # Plus 0: blocks that change nothing make +0 of -0, and which are walked depends on the tile.
    y = tl.fma(acc, tl.broadcast_to(share[:, None], acc.shape), tl.zeros(acc.shape, tl.float32))
    e = tl.where(none, float("-inf"), (tl.log2(total) + top) * _LN_2)
    return tl.where(none[:, None], 0.0, y), e


@triton.jit(do_not_specialize=["heads", "rows", "blocks", "v_size"])
def _combine_kernel(
    parts, out, lse, heads, rows, blocks, v_size,
    PART: tl.constexpr, PARTS: tl.constexpr, BATCH: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """PART columns of one row from its blocks."""
    take_turn()
    columns = tl.program_id(0) % PARTS * PART + tl.arange(0, PART)
    task = (tl.program_id(0) // PARTS).to(tl.int64)
    row, head, batch = task % rows, task // rows % heads, task // rows // heads
    there = (columns < v_size)[None, :]
    one = tl.arange(0, 1)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, PART), tl.float32)
    count = blocks
    if CAUSAL:
        count = tl.minimum(count, (row // _BLOCK + 1).to(tl.int32))
    for begin in tl.range(0, count, BATCH):
        # All loads of a batch are on their way before the first is used.
        held = ()
        for i in tl.static_range(BATCH):
            block = begin + i
            at = parts + (task * blocks + block) * (v_size + 2)
            mine = block + one < count
            next_top = tl.load(at + v_size + one, mask=mine, other=float("-inf"))
            next_total = tl.load(at + v_size + 1 + one, mask=mine, other=0.0)
            next_acc = tl.load(at + columns[None, :], mask=there & mine[None, :], other=0.0)
            held = held + ((next_top, next_total, next_acc),)
        for i in tl.static_range(BATCH):
            top, total, acc = merge(top, total, acc, held[i][0], held[i][1], held[i][2])
    y, e = finish(top, total, acc)
    to = out + ((batch * rows + row) * heads + head) * v_size
    tl.store(to + columns[None, :], y.to(out.dtype.element_ty), mask=there)
    if tl.program_id(0) % PARTS == 0:
        tl.store(lse + task + one, e)


combine = RowKernel(_combine_kernel, overlaps=FEW.value)
