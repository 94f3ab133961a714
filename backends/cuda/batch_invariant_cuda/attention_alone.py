"""Attention in bf16 and fp16 on Hopper for a few rows, a multiprocessor for each tile.

The bits of `attention_step.py`, by a program that has all buffers of a multiprocessor. While the
matrix units weigh the values of one block and compute the scores of the block after the next, the
exponentials of the next are taken and the block before is merged.
"""

# ruff: noqa: RUF005  (compiled by Triton, which knows less of Python)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from batch_invariant_cuda.attention_hopper import KEYS
from batch_invariant_cuda.attention_step import (
    buffers,
    copy,
    finish_tile,
    load_queries,
    merge,
    scores_layout,
    store_weights,
    sum_of,
    weights,
)

_SLOTS = 6  # of the ring, with heads of 128

_KEYS = gl.constexpr(KEYS)


def slots_of(size: int) -> int:
    """Buffers of the ring for heads of that size."""
    return _SLOTS * 128 // size


@gluon.jit(do_not_specialize=["heads", "group", "rows", "keys", "q_batch", "q_head", "q_row"])
def attention_alone(
    kd, vd, q, out, lse,
    heads, group, rows, keys, q_batch, q_head, q_row, scale: gl.float32,
    D: gl.constexpr, ROWS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """All rows of the heads that share a key head. Strides of q come divided by 8."""
    gl.static_assert(SLOTS % 2 == 0)
    LAYOUT: gl.constexpr = scores_layout(ROWS)
    COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    ring = gl.allocate_shared_memory(kd.dtype, [SLOTS] + kd.block_type.shape, kd.layout)
    qbuf, pbufs = buffers(kd.dtype, D, ROWS, 2)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
    kv_heads = heads // group
    kv_head = gl.program_id(0) % kv_heads
    batch = gl.program_id(0) // kv_heads
    blocks = (keys + _KEYS - 1) // _KEYS
    end = 2 * blocks
    fence_async_shared()
    gl.thread_barrier()
    gdc_wait()
    for i in gl.static_range(SLOTS):
        copy(kd, vd, ring, full, i, end, batch, kv_head, 0, D, SLOTS)
    load_queries(q, qbuf, batch, kv_head, group, rows, q_batch, q_head, q_row)
    fence_async_shared()
    gl.thread_barrier()
    zero = gl.zeros([_KEYS, ROWS], gl.float32, LAYOUT)
    level = gl.zeros([D, ROWS], gl.float32, LAYOUT)
    # Behind the last block, scores are computed of whatever lies in the ring, and not used.
    queries = qbuf.permute((1, 0))
    mbarrier.wait(full.index(0), 0)
    k = ring.index(0).reshape([_KEYS, D])
    s = warpgroup_mma(k, queries, zero, use_acc=False, is_async=True)
    mbarrier.wait(full.index(2), 0, pred=blocks > 1)
    k = ring.index(2).reshape([_KEYS, D])
    next_s = warpgroup_mma(k, queries, zero, use_acc=False, is_async=True)
    s, next_s = warpgroup_mma_wait(0, deps=[s, next_s])
    gl.thread_barrier()
    copy(kd, vd, ring, full, SLOTS, end, batch, kv_head, 0, D, SLOTS)
    copy(kd, vd, ring, full, SLOTS + 2, end, batch, kv_head, 0, D, SLOTS)
    p, top = weights(s, 0, keys, scale)
    total = sum_of(p)
    store_weights(p, pbufs.index(0))
    # The rows from the blocks so far, and the block that comes to them next.
    all_top = gl.full([ROWS], float("-inf"), gl.float32, COLUMN)
    all_total = gl.zeros([ROWS], gl.float32, COLUMN)
    acc = level
    last_top = all_top
    last_total = all_total
    last = level
    for j in range(0, blocks):
        fence_async_shared()
        gl.thread_barrier()
        step = 2 * j + 1
        mbarrier.wait(full.index(step % SLOTS), step // SLOTS & 1)
        v = ring.index(step % SLOTS).reshape([_KEYS, D]).permute((1, 0))
        now = pbufs.index(j % 2).permute((1, 0))
        part = warpgroup_mma(v, now, level, use_acc=False, is_async=True)
        later = step + 3
        mbarrier.wait(full.index(later % SLOTS), later // SLOTS & 1, pred=later < end)
        k = ring.index(later % SLOTS).reshape([_KEYS, D])
        later_s = warpgroup_mma(k, queries, zero, use_acc=False, is_async=True)
        if j > 0:  # what the turn before this one is done with
            copy(kd, vd, ring, full, step - 2 + SLOTS, end, batch, kv_head, 0, D, SLOTS)
            copy(kd, vd, ring, full, later - 2 + SLOTS, end, batch, kv_head, 0, D, SLOTS)
        p, next_top = weights(next_s, j + 1, keys, scale)
        next_total = sum_of(p)
        store_weights(p, pbufs.index((j + 1) % 2))
        all_top, all_total, acc = merge(all_top, all_total, acc, last_top, last_total, last)
        part, next_s = warpgroup_mma_wait(0, deps=[part, later_s])
        last_top = top
        last_total = total
        last = part
        top = next_top
        total = next_total
    gdc_launch_dependents()
    all_top, all_total, acc = merge(all_top, all_total, acc, last_top, last_total, last)
    finish_tile(out, lse, all_top, all_total, acc, batch, kv_head, heads, group, rows)
