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

ROWS = 16  # of a tile at most
_FEW_ROWS = 8
SLOTS = 3  # of a ring, of which two fit a multiprocessor

_KEYS = gl.constexpr(KEYS)
_EXTRA = gl.constexpr(EXTRA)
_LN_2 = gl.constexpr(0.6931471805599453)


def rows_of_tile(shared: int) -> int:
    """Rows of a tile where so many share a key head: half a tile is computed in less time."""
    return _FEW_ROWS if shared <= _FEW_ROWS else ROWS


@gluon.constexpr_function
def scores_layout(rows):
    """Scores [128, rows] as the matrix units leave them: 16 keys of every 64 to each warp."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows, 16])


@gluon.jit
def buffers(dtype: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, COUNT: gl.constexpr):
    """Shared memory for a tile's queries [rows, D] and for their weights [COUNT, rows, 128]."""
    q: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    p: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, _KEYS], dtype)
    qbuf = gl.allocate_shared_memory(dtype, [ROWS, D], q)
    return qbuf, gl.allocate_shared_memory(dtype, [COUNT, ROWS, _KEYS], p)


@gluon.jit
def store_weights(p, pbuf):
    """For the matrix units: call `fence_async_shared` and let warps meet before they read."""
    pbuf.store(gl.permute(p.to(pbuf.dtype), (1, 0)))


@gluon.jit
def copy(
    kd, vd, ring, full, step, end, batch, kv_head, first, D: gl.constexpr, SLOTS: gl.constexpr
):  # fmt: skip
    """Begins copy number `step`: the keys of block `first`, its values, the next keys, ...

    Nothing from `end` on.
    """
    if step < end:
        slot = step % SLOTS
        bar = full.index(slot)
        mbarrier.expect(bar, _KEYS * D * 2)
        at = [batch, kv_head, (first + step // 2) * _KEYS, 0]
        if step % 2 == 0:
            tma.async_copy_global_to_shared(kd, at, bar, ring.index(slot))
        else:
            tma.async_copy_global_to_shared(vd, at, bar, ring.index(slot))


@gluon.constexpr_function
def rows_layout(width):
    """Rows of 16-bit numbers, of which a thread loads 16 bytes."""
    return gl.BlockedLayout([1, 8], [32 * 8 // width, width // 8], [4, 1], [1, 0])


@gluon.jit
def load_rows(at, there, qbuf):
    """The rows at the pointers `at` [n], or zeros; slices of `rows_layout`."""
    D: gl.constexpr = qbuf.shape[1]
    d = gl.arange(0, D, gl.SliceLayout(0, rows_layout(D)))
    qbuf.store(gl.load(at[:, None] + d[None, :], mask=there[:, None], other=0.0))


@gluon.jit
def load_queries(q, qbuf, batch, kv_head, group, rows, q_batch, q_head, q_row):
    """The rows of a tile; zeros behind them."""
    LOAD: gl.constexpr = rows_layout(qbuf.shape[1])
    index = gl.arange(0, qbuf.shape[0], gl.SliceLayout(1, LOAD))
    head = (kv_head * group + index % group).to(gl.int64)
    row = (index // group).to(gl.int64)
    at = (batch.to(gl.int64) * q_batch + head * q_head + row * q_row) * 8
    load_rows(q + at, index < rows * group, qbuf)


@gluon.constexpr_function
def _held_by_all(rows):
    """Half of the scores, [64, rows], in every warp; in a warp they lie as scores do."""
    in_thread = [[0, 1], *([[0, 8]] if rows > 8 else []), [8, 0], [16, 0], [32, 0]]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(in_thread, lanes, [[0, 0]] * 2, [], [64, rows])


@gluon.jit
def sum_of(p):
    """The sum of each column of p [128, n]: halves folded down to 8, neighbours, halves again.

    Warps exchange what they have once.
    """
    N: gl.constexpr = p.shape[1]
    v = gl.sum(gl.reshape(p, [2, 64, N]), 0)
    v = gl.convert_layout(v, _held_by_all(N))
    v = gl.sum(gl.reshape(v, [2, 32, N]), 0)
    v = gl.sum(gl.reshape(v, [2, 16, N]), 0)
    v = gl.sum(gl.reshape(v, [2, 8, N]), 0)
    v = gl.sum(gl.reshape(v, [4, 2, N]), 1)
    v = gl.sum(gl.reshape(v, [2, 2, N]), 0)
    return gl.convert_layout(gl.sum(v, 0), gl.SliceLayout(0, p.type.layout))


@gluon.jit
def weights(s, block, keys, scale):
    """The exponentials of scores, and the maximum that was subtracted."""
    key = block * _KEYS + gl.arange(0, _KEYS, gl.SliceLayout(1, s.type.layout))
    s = gl.where((key < keys)[:, None], s, float("-inf"))
    top = gl.max(s, 0) * scale
    base = gl.where(top == float("-inf"), 0.0, top)
    return gl.exp2(s * scale - base[None, :]), top


@gluon.jit
def merge(top, total, acc, next_top, next_total, part):
    """`attention_merge.merge` of transposed tiles."""
    new_top = gl.maximum(top, next_top)
    base = gl.where(new_top == float("-inf"), 0.0, new_top)
    shrink, share = gl.exp2(top - base), gl.exp2(next_top - base)
    total = gl.fma(next_total, share, total * shrink)
    LAYOUT: gl.constexpr = acc.type.layout
    level = gl.zeros([acc.shape[0], acc.shape[1]], gl.float32, LAYOUT)
    return new_top, total, gl.fma(part, level + share[None, :], acc * shrink[None, :])


@gluon.jit
def finish(to, lse_at, top, total, acc, valid):
    """Writes the results of a tile, a row and its log-sum-exp to each pair of pointers."""
    D: gl.constexpr = acc.shape[0]
    LAYOUT: gl.constexpr = acc.type.layout
    none = total == 0.0
    share = gl.div_rn(1.0, gl.where(none, 1.0, total))
    e = gl.where(none, float("-inf"), (gl.log2(total) + top) * _LN_2)
    gl.store(lse_at, e, mask=valid)
    # Plus 0 as in the other kernels of this order.
    level = gl.zeros([D, acc.shape[1]], gl.float32, LAYOUT)
    y = gl.fma(acc, level + share[None, :], level)
    column = gl.arange(0, D, gl.SliceLayout(1, LAYOUT))
    gl.store(to[None, :] + column[:, None], y.to(to.dtype.element_ty), mask=valid[None, :])


@gluon.jit
def finish_tile(out, lse, top, total, acc, batch, kv_head, heads, group, rows):
    """`finish` of all rows of the heads that share a key head."""
    index = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    row = index // group
    head = kv_head * group + index % group
    to = out + ((batch.to(gl.int64) * rows + row) * heads + head) * acc.shape[0]
    at = lse + (batch.to(gl.int64) * heads + head) * rows + row
    finish(to, at, top, total, acc, row < rows)


@gluon.jit
def leave(to, top, total, acc, valid):
    """Writes a part, which stays in the cache while keys and values pass through it."""
    D: gl.constexpr = acc.shape[0]
    column = gl.arange(0, D, gl.SliceLayout(1, acc.type.layout))
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
    D: gl.constexpr, ROWS: gl.constexpr, SPLIT: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """All rows of the heads that share a key head; SPLIT: one of `runs` runs of `run` blocks.

    The first run is merged here and leaves one part, in the place of its last block; the others
    leave a part for each block. Strides of q come divided by 8.
    """
    LAYOUT: gl.constexpr = scores_layout(ROWS)
    COLUMN: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    ring = gl.allocate_shared_memory(kd.dtype, [SLOTS] + kd.block_type.shape, kd.layout)
    qbuf, pbufs = buffers(kd.dtype, D, ROWS, 1)
    pbuf = pbufs.index(0)
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
    end = 2 * count
    fence_async_shared()
    gl.thread_barrier()
    gdc_wait()
    if run == 1:
        gdc_launch_dependents()
    for i in gl.static_range(SLOTS):
        copy(kd, vd, ring, full, i, end, batch, kv_head, first, D, SLOTS)
    load_queries(q, qbuf, batch, kv_head, group, rows, q_batch, q_head, q_row)
    fence_async_shared()
    gl.thread_barrier()
    index = gl.arange(0, ROWS, COLUMN)
    valid = index < rows * group
    head = kv_head * group + index % group
    place = (batch.to(gl.int64) * heads + head) * rows + index // group
    top = gl.full([ROWS], float("-inf"), gl.float32, COLUMN)
    total = gl.zeros([ROWS], gl.float32, COLUMN)
    acc = gl.zeros([D, ROWS], gl.float32, LAYOUT)
    zero = gl.zeros([_KEYS, ROWS], gl.float32, LAYOUT)
    level = gl.zeros([D, ROWS], gl.float32, LAYOUT)
    for j in range(0, count):
        step = 2 * j
        mbarrier.wait(full.index(step % SLOTS), step // SLOTS & 1)
        k = ring.index(step % SLOTS).reshape([_KEYS, D])
        s = warpgroup_mma(k, qbuf.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        gl.thread_barrier()
        copy(kd, vd, ring, full, step + SLOTS, end, batch, kv_head, first, D, SLOTS)
        p, next_top = weights(s, first + j, keys, scale)
        store_weights(p, pbuf)
        fence_async_shared()
        step += 1
        mbarrier.wait(full.index(step % SLOTS), step // SLOTS & 1)
        v = ring.index(step % SLOTS).reshape([_KEYS, D]).permute((1, 0))
        gl.thread_barrier()
        part = warpgroup_mma(v, pbuf.permute((1, 0)), level, use_acc=False, is_async=True)
        next_total = sum_of(p)
        part = warpgroup_mma_wait(0, deps=[part])
        gl.thread_barrier()
        copy(kd, vd, ring, full, step + SLOTS, end, batch, kv_head, first, D, SLOTS)
        if not SPLIT:  # noqa: SIM114  (a constexpr, and a number on the device)
            top, total, acc = merge(top, total, acc, next_top, next_total, part)
        elif first == 0:
            top, total, acc = merge(top, total, acc, next_top, next_total, part)
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
        finish_tile(out, lse, top, total, acc, batch, kv_head, heads, group, rows)
