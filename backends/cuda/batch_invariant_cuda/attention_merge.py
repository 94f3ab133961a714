"""Blocks of keys put together: a row's state, its result, and rows from blocks left in memory."""

# ruff: noqa: RUF005  (compiled by Triton, which knows less of Python)
from __future__ import annotations

import triton
import triton.language as tl

from batch_invariant_cuda.row_launch import RowKernel
from batch_invariant_cuda.rows import FEW, take_turn

BLOCK = 128  # keys
# Numbers behind a weighted sum in memory: its maximum, its sum, and room that keeps parts aligned.
EXTRA = 8
LOG2_E = tl.constexpr(1.4426950408889634)

_BLOCK = tl.constexpr(BLOCK)
_EXTRA = tl.constexpr(EXTRA)
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


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _sums(at, stride, first, end, columns, there, BATCH: tl.constexpr):
    """Weighted sums of the next blocks."""
    at += first * stride
    left = end - first
    held = ()
    for i in tl.static_range(BATCH):
        held = held + (tl.load(at + i * stride + columns, mask=there & (left > i), other=0.0),)
    return held


@triton.jit
def _scales(at, stride, first, end, BATCH: tl.constexpr):
    """Maxima and sums of the next blocks, one in a lane."""
    block = first + tl.arange(0, BATCH)
    at += block * stride
    tops = tl.load(at, mask=block < end, other=float("-inf"))
    return tops, tl.load(at + 1, mask=block < end, other=0.0)


@triton.jit
def _factors(top, tops):
    """What `merge` multiplies by, for the blocks that follow a maximum; and the maximum then."""
    lane = tl.arange(0, tops.shape[0])
    highest = tl.maximum(tl.associative_scan(tops, 0, _larger), top)
    before = tl.where(lane == 0, top, tl.gather(highest, tl.maximum(lane - 1, 0), 0))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    return tl.exp2(before - base), tl.exp2(tops - base), tl.max(highest, 0)


@triton.jit
def merge_blocks(at, stride, scales, begin, end, columns, there, BATCH: tl.constexpr):
    """Blocks `begin` to `end` of one row: [1], [1] and, of some columns, [1, n].

    A block's part is at `at` + block * `stride`: its weighted sum, and its maximum and sum `scales`
    behind. The bits of `merge`, one block after the other: maxima so far are a scan, which no order
    changes, so the factors of a batch are computed at once, one in a lane; one FMA and one product
    for a block remain in the chain. A batch is on its way while the one before it is merged.
    """
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros(columns.shape, tl.float32)
    held = _sums(at, stride, begin, end, columns, there, BATCH)
    tops, totals = _scales(at + scales, stride, begin, end, BATCH)
    shrink, share, top = _factors(top, tops)
    adds = totals
    tops, totals = _scales(at + scales, stride, begin + BATCH, end, BATCH)
    for first in tl.range(begin, end, BATCH):
        now, now_shrink, now_share, now_adds = held, shrink, share, adds
        held = _sums(at, stride, first + BATCH, end, columns, there, BATCH)
        shrink, share, top = _factors(top, tops)
        adds = totals
        tops, totals = _scales(at + scales, stride, first + 2 * BATCH, end, BATCH)
        for i in tl.static_range(BATCH):
            chosen = tl.full((1,), i, tl.int32)
            old, new = tl.gather(now_shrink, chosen, 0), tl.gather(now_share, chosen, 0)
            total = tl.fma(tl.gather(now_adds, chosen, 0), new, total * old)
            acc = tl.fma(now[i], tl.broadcast_to(new, acc.shape), acc * old)
    return top + tl.zeros((1,), tl.float32), total, acc[None, :]


@triton.jit(do_not_specialize=["heads", "rows", "blocks", "first", "v_size"])
def _combine_kernel(
    parts, out, lse, heads, rows, blocks, first, v_size,
    PART: tl.constexpr, PARTS: tl.constexpr, BATCH: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """PART columns of one row from its blocks; the part of block `first` holds those before too."""
    take_turn()
    columns = tl.program_id(0) % PARTS * PART + tl.arange(0, PART)
    task = (tl.program_id(0) // PARTS).to(tl.int64)
    row, head, batch = task % rows, task // rows % heads, task // rows // heads
    there = columns < v_size
    one = tl.arange(0, 1)
    count = blocks
    if CAUSAL:
        count = tl.minimum(count, (row // _BLOCK + 1).to(tl.int32))
    DV: tl.constexpr = PART * PARTS
    at = parts + task * blocks * (DV + _EXTRA)
    top, total, acc = merge_blocks(at, DV + _EXTRA, DV, first, count, columns, there, BATCH)
    y, e = finish(top, total, acc)
    to = out + ((batch * rows + row) * heads + head) * v_size
    tl.store(to + columns[None, :], y.to(out.dtype.element_ty), mask=there[None, :])
    if tl.program_id(0) % PARTS == 0:
        tl.store(lse + task + one, e)


combine = RowKernel(_combine_kernel, overlaps=FEW.value)
