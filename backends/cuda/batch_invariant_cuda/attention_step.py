"""Attention in bf16 and fp16 on Hopper for a few rows, as in a decode step, written in Gluon.

Up to 16 rows that share a key head are the columns of transposed products: scores are keys times
queries, so that blocks of keys fill the matrix units. Keys and values are copied in bulk into a
ring of buffers. Order as in `attention_blocks`.
"""

# ruff: noqa: RUF005  (compiled by Triton, which knows less of Python)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from batch_invariant_cuda.attention_hopper import KEYS
from batch_invariant_cuda.attention_merge import EXTRA

ROWS = 16  # of a tile
SLOTS = 3  # of a ring, of which two fit a multiprocessor
ALL_SLOTS = 6  # of one that has a multiprocessor to itself

_ROWS = gl.constexpr(ROWS)
_KEYS = gl.constexpr(KEYS)
_EXTRA = gl.constexpr(EXTRA)
_LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _copy(
    kd, vd, ring, full, step, batch, kv_head, first, D: gl.constexpr, SLOTS: gl.constexpr
):  # fmt: skip
    """Begins copy number `step`: the keys of a block, its values, the keys of the next, ..."""
    slot = step % SLOTS
    bar = full.index(slot)
    mbarrier.expect(bar, _KEYS * D * 2)
    at = [batch, kv_head, first + step // 2 * _KEYS, 0]
    if step % 2 == 0:
        tma.async_copy_global_to_shared(kd, at, bar, ring.index(slot))
    else:
        tma.async_copy_global_to_shared(vd, at, bar, ring.index(slot))


@gluon.jit
def _sum(p):
    """The sum of each column of p [128, n]: halves folded down to 8, neighbours, halves again."""
    N: gl.constexpr = p.shape[1]
    p = gl.sum(gl.reshape(p, [2, 64, N]), 0)
    p = gl.sum(gl.reshape(p, [2, 32, N]), 0)
    p = gl.sum(gl.reshape(p, [2, 16, N]), 0)
    p = gl.sum(gl.reshape(p, [2, 8, N]), 0)
    p = gl.sum(gl.reshape(p, [4, 2, N]), 1)
    p = gl.sum(gl.reshape(p, [2, 2, N]), 0)
    return gl.sum(p, 0)


@gluon.jit
def _merge(top, total, acc, next_top, next_total, part):
    """`attention_merge.merge` of transposed tiles."""
    LAYOUT: gl.constexpr = acc.type.layout
    highest = gl.maximum(top, next_top)
    base = gl.where(highest == float("-inf"), 0.0, highest)
    shrink, share = gl.exp2(top - base), gl.exp2(next_top - base)
    total = gl.fma(next_total, share, total * shrink)
    level = gl.zeros([acc.shape[0], acc.shape[1]], gl.float32, LAYOUT)
    return highest, total, gl.fma(part, level + share[None, :], acc * shrink[None, :])


@gluon.jit
def leave(to, top, total, acc, valid):
    """Writes a part, which stays in the cache while keys and values pass through it."""
    D: gl.constexpr = acc.shape[0]
    LAYOUT: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    column = gl.arange(0, D, LAYOUT)
    gl.store(to[None, :] + column[:, None], acc, mask=valid[None, :], eviction_policy="evict_last")
    gl.store(to + D, top, mask=valid, eviction_policy="evict_last")
    gl.store(to + D + 1, total, mask=valid, eviction_policy="evict_last")


@gluon.jit(
    do_not_specialize=[
        "heads", "group", "rows", "keys", "blocks", "run", "runs", "q_batch", "q_head", "q_row"
    ]
)  # fmt: skip
def attention_step(
    kd, vd, q, out, lse, parts,
    heads, group, rows, keys, blocks, run, runs, q_batch, q_head, q_row, scale: gl.float32,
    D: gl.constexpr, SPLIT: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """All rows of the heads that share a key head; SPLIT: one of `runs` runs of `run` blocks.

    The first run is merged here and leaves one part, in the place of its last block; the others
    leave a part for each block. Strides of q come divided by 8.
    """
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _ROWS, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    P_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_KEYS, _ROWS], kd.dtype)
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_ROWS, D], kd.dtype)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    ring = gl.allocate_shared_memory(kd.dtype, [SLOTS] + kd.block_type.shape, kd.layout)
    pbuf = gl.allocate_shared_memory(kd.dtype, [_KEYS, _ROWS], P_LAYOUT)
    qbuf = gl.allocate_shared_memory(kd.dtype, [_ROWS, D], Q_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
    piece = gl.program_id(0) % runs
    pair = gl.program_id(0) // runs
    kv_heads = heads // group
    kv_head = pair % kv_heads
    batch = pair // kv_heads
    first = piece * run
    count = gl.minimum(run, blocks - first)
    fence_async_shared()
    gl.thread_barrier()
    gdc_wait()
    if run == 1:
        gdc_launch_dependents()
    for i in gl.static_range(SLOTS):
        if i < 2 * count:
            _copy(kd, vd, ring, full, i, batch, kv_head, first * _KEYS, D, SLOTS)
    index = gl.arange(0, _ROWS, gl.SliceLayout(1, LOAD))
    head = (kv_head * group + index % group).to(gl.int64)
    row = (index // group).to(gl.int64)
    at = (batch.to(gl.int64) * q_batch + head * q_head + row * q_row) * 8
    d = gl.arange(0, D, gl.SliceLayout(0, LOAD))
    there = (index < rows * group)[:, None]
    qbuf.store(gl.load(q + at[:, None] + d[None, :], mask=there, other=0.0))
    fence_async_shared()
    gl.thread_barrier()
    index = gl.arange(0, _ROWS, COLUMN)
    row = index // group
    head = kv_head * group + index % group
    valid = row < rows
    place = (batch.to(gl.int64) * heads + head) * rows + row
    top = gl.full([_ROWS], float("-inf"), gl.float32, COLUMN)
    total = gl.zeros([_ROWS], gl.float32, COLUMN)
    acc = gl.zeros([D, _ROWS], gl.float32, S_LAYOUT)
    zero = gl.zeros([_KEYS, _ROWS], gl.float32, S_LAYOUT)
    for j in range(0, count):
        step = 2 * j
        mbarrier.wait(full.index(step % SLOTS), step // SLOTS & 1)
        k = ring.index(step % SLOTS).reshape([_KEYS, D])
        s = warpgroup_mma(k, qbuf.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        gl.thread_barrier()
        if step + SLOTS < 2 * count:
            _copy(kd, vd, ring, full, step + SLOTS, batch, kv_head, first * _KEYS, D, SLOTS)
        key = (first + j) * _KEYS + gl.arange(0, _KEYS, gl.SliceLayout(1, S_LAYOUT))
        s = gl.where((key < keys)[:, None], s, float("-inf"))
        next_top = gl.max(s, 0) * scale
        base = gl.where(next_top == float("-inf"), 0.0, next_top)
        p = gl.exp2(s * scale - base[None, :])
        pbuf.store(p.to(kd.dtype))
        fence_async_shared()
        next_total = gl.convert_layout(_sum(p), COLUMN)
        step += 1
        mbarrier.wait(full.index(step % SLOTS), step // SLOTS & 1)
        v = ring.index(step % SLOTS).reshape([_KEYS, D]).permute((1, 0))
        part = gl.zeros([D, _ROWS], gl.float32, S_LAYOUT)
        gl.thread_barrier()
        part = warpgroup_mma(v, pbuf, part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=[part])
        gl.thread_barrier()
        if step + SLOTS < 2 * count:
            _copy(kd, vd, ring, full, step + SLOTS, batch, kv_head, first * _KEYS, D, SLOTS)
        if not SPLIT:  # noqa: SIM114  (a constexpr, and a number on the device)
            top, total, acc = _merge(top, total, acc, next_top, next_total, part)
        elif first == 0:
            top, total, acc = _merge(top, total, acc, next_top, next_total, part)
        else:
            to = parts + (place * blocks + first + j) * (D + _EXTRA)
            leave(to, next_top, next_total, part, valid)
    if SPLIT:  # noqa: SIM102
        if first == 0:
            to = parts + (place * blocks + count - 1) * (D + _EXTRA)
            leave(to, top, total, acc, valid)
    # Programs of the next launch that came while all multiprocessors are full would crowd on few.
    gdc_launch_dependents()
    if not SPLIT:
        none = total == 0.0
        share = gl.div_rn(1.0, gl.where(none, 1.0, total))
        e = gl.where(none, float("-inf"), (gl.log2(total) + top) * _LN_2)
        gl.store(lse + place, e, mask=valid)
        # Plus 0 as in the other kernels of this order.
        level = gl.zeros([D, _ROWS], gl.float32, S_LAYOUT)
        y = gl.fma(acc, level + share[None, :], level)
        column = gl.arange(0, D, gl.SliceLayout(1, S_LAYOUT))
        to = out + ((batch.to(gl.int64) * rows + row) * heads + head) * D
        gl.store(to[None, :] + column[:, None], y.to(kd.dtype), mask=valid[None, :])
