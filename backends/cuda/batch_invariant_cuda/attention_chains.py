"""Attention in fp32 on CUDA: the order of the contract, the bits of the CPU reference.

Two passes over the keys: the exact maximum of the scores, then exp, denominator and weighted sum.
Dot products are added over chunks of 16 of the head size, weights and weighted values over blocks
of 128 keys. Each chunk and each block is a chain of fp32 FMAs (Triton's IEEE dot) in ascending
order, and so are their sums added. Under a mask, blocks are counted from the first key of each row,
which `attention_plan` finds. So a row's bits depend neither on the tile, nor on how many rows are
computed together, nor on padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batch_invariant_cuda.explog import exp, log
from batch_invariant_cuda.row_launch import RowKernel
from batch_invariant_cuda.rows import larger, rounded

SIZE_CHUNK = 16
KEY_BLOCK = 128
NO_MASK = 0
BOOL_MASK = 1
ADDITIVE_MASK = 2

_CHUNK = tl.constexpr(SIZE_CHUNK)
_BLOCK = tl.constexpr(KEY_BLOCK)
_NO_MASK = tl.constexpr(NO_MASK)
_BOOL_MASK = tl.constexpr(BOOL_MASK)


def size_chunks(size: int) -> int:
    """Chunks of a head size; of 0 one, which adds nothing."""
    return max(1, triton.cdiv(size, SIZE_CHUNK))


@triton.jit
def load_queries(q, at, there, size, CHUNKS: tl.constexpr):
    """Rows of q in fp32, as a tuple of chunks [BM, 16] of the head size."""
    chunks = ()
    for c in tl.static_range(CHUNKS):
        d = c * _CHUNK + tl.arange(0, _CHUNK)
        held = there[:, None] & (d[None, :] < size)
        chunk = tl.load(q + at[:, None] + d[None, :], mask=held, other=0.0)
        chunks = chunks + (chunk.to(tl.float32),)  # noqa: RUF005
    return chunks


@triton.jit
def _chain(chunk, k, at, there, size, c):
    d = c * _CHUNK + tl.arange(0, _CHUNK)
    held = there[None, :] & (d[:, None] < size)
    tile = tl.load(k + at[None, :] + d[:, None], mask=held, other=0.0).to(tl.float32)
    return tl.dot(chunk, tile, input_precision="ieee")


@triton.jit
def products(chunks, k, at, there, size, CHUNKS: tl.constexpr):
    """Queries times keys, [BM, BN]: a chain for each chunk, the chains added ascending."""
    s = _chain(chunks[0], k, at, there, size, 0)
    ones = tl.full(s.shape, 1.0, tl.float32)
    for c in tl.static_range(1, CHUNKS):
        # The sum of both; of a plus Triton would make one chain that begins with s.
        s = tl.fma(_chain(chunks[c], k, at, there, size, c), ones, s)
    return s


@triton.jit
def _extend(
    total, acc, p, absent, tile, infinite, v, at, there, v_size, CARE: tl.constexpr
):  # fmt: skip
    """The chains of weights and of weighted values, longer by BN keys.

    CARE: a key that is absent adds nothing even if its value is infinite or NaN.
    """
    BM: tl.constexpr = p.shape[0]
    BN: tl.constexpr = p.shape[1]
    DV: tl.constexpr = acc.shape[1]
    total = tl.dot(p, tl.full((BN, 16), 1.0, tl.float32), total, input_precision="ieee")
    if infinite == 0:
        acc = tl.dot(p, tile, acc, input_precision="ieee")
    else:
        # 0 * inf is not 0: the same chains, key by key, without those that take no part.
        dv = tl.arange(0, DV)
        for j in tl.range(0, BN):
            chosen = tl.arange(0, BN) == j
            weight = tl.sum(tl.where(chosen[None, :], p, 0.0), 1)
            held = (dv < v_size) & (tl.sum(tl.where(chosen & there, 1, 0), 0) != 0)
            value = tl.load(v + tl.sum(tl.where(chosen, at, 0), 0) + dv, mask=held, other=0.0)
            more = tl.fma(
                tl.broadcast_to(weight[:, None], (BM, DV)),
                tl.broadcast_to(value.to(tl.float32)[None, :], (BM, DV)),
                acc,
            )
            if CARE:
                skipped = tl.max(tl.where(chosen[None, :] & absent, 1, 0), 1)
                acc = tl.where(skipped[:, None] != 0, acc, more)
            else:
                acc = more
    return total, acc


@triton.jit
def add_keys(
    total, acc, block_total, block_acc, p, absent, v, at, there, v_size, cut,
    ALIGNED: tl.constexpr, CARE: tl.constexpr,
):  # fmt: skip
    """Sums of weights and of weighted values, and those of the block that is not yet ended.

    p: the weights [BM, BN] of the next BN keys, -0.0 where `absent`, which changes no chain of
    finite values. at: where their values lie. cut: before which of the BN keys the block of a row
    ends, if it is one of them. ALIGNED: all blocks end before the first of the BN keys, or none.
    `varlen_chains` counts blocks from the sequence's first key, so all of its rows are aligned.
    """
    BN: tl.constexpr = p.shape[1]
    dv = tl.arange(0, acc.shape[1])
    held = there[:, None] & (dv[None, :] < v_size)
    tile = tl.load(v + at[:, None] + dv[None, :], mask=held, other=0.0).to(tl.float32)
    infinite = tl.max(tl.max(tl.where(tile - tile == 0.0, 0, 1), 1), 0)
    if tl.min(cut, 0) < BN:
        if not ALIGNED:
            before = tl.arange(0, BN)[None, :] < cut[:, None]
            block_total, block_acc = _extend(
                block_total, block_acc, tl.where(before, p, -0.0), absent | ~before,
                tile, infinite, v, at, there, v_size, True,
            )  # fmt: skip
            p = tl.where(before, -0.0, p)
            absent = absent | before
        ends = (cut < BN)[:, None]
        total = tl.where(ends, total + block_total, total)
        acc = tl.where(ends, acc + block_acc, acc)
        block_total = tl.where(ends, 0.0, block_total)
        block_acc = tl.where(ends, 0.0, block_acc)
    block_total, block_acc = _extend(
        block_total, block_acc, p, absent, tile, infinite, v, at, there, v_size, CARE
    )
    return total, acc, block_total, block_acc


@triton.jit
def _scores(
    q,
    k,
    mask,
    row,
    key,
    rows,
    keys,
    size,
    k_row,
    mask_row,
    mask_column,
    scale,
    CHUNKS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Scores [BM, BN] in fp32, -inf where a key takes no part."""
    s = products(q, k, key.to(tl.int64) * k_row, key < keys, size, CHUNKS) * scale
    takes_part = (key[None, :] < keys) & (row[:, None] < rows)
    if CAUSAL:
        takes_part = takes_part & (key[None, :] <= row[:, None])
    if MASK != _NO_MASK:
        at = row.to(tl.int64)[:, None] * mask_row + key.to(tl.int64)[None, :] * mask_column
        m = tl.load(mask + at, mask=takes_part, other=0.0)
        if MASK == _BOOL_MASK:
            takes_part = takes_part & (m != 0)
        else:
            added = m.to(tl.float32)
            takes_part = takes_part & (added != float("-inf"))
            s = s + added
    return tl.where(takes_part, s, float("-inf"))


@triton.jit(
    do_not_specialize=[
        "heads", "group", "rows", "keys", "size", "v_size", "blocks",
        "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
        "mask_batch", "mask_head", "mask_row", "mask_column",
        "first_batch", "first_head", "first_row", "scale",
    ]
)  # fmt: skip
def _attention_kernel(
    q, k, v, mask, first, out, lse,
    heads, group, rows, keys, size, v_size, blocks,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_column, first_batch, first_head, first_row, scale,
    BM: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    block, head, batch = task % blocks, task // blocks % heads, task // blocks // heads
    row = (block * BM + tl.arange(0, BM)).to(tl.int32)
    dv = tl.arange(0, DV)
    from_q = q + batch * q_batch + head * q_head
    from_k = k + batch * k_batch + head // group * k_head
    from_v = v + batch * v_batch + head // group * v_head
    from_mask = mask
    base = tl.zeros((BM,), tl.int32)  # the key from which blocks are counted
    if MASK != _NO_MASK:
        from_mask = mask + batch * mask_batch + head * mask_head
        from_first = first + batch * first_batch + head * first_head
        base = tl.load(from_first + row.to(tl.int64) * first_row, mask=row < rows, other=0)
    tile_q = load_queries(from_q, row.to(tl.int64) * q_row, row < rows, size, CHUNKS)
    last = keys
    if CAUSAL:
        last = tl.minimum(keys, (block * BM + BM).to(tl.int32))
    top = tl.full((BM,), float("-inf"), tl.float32)
    for begin in tl.range(0, last, BN):
        key = begin + tl.arange(0, BN)
        s = _scores(
            tile_q, from_k, from_mask, row, key, rows, keys, size, k_row, mask_row, mask_column,
            scale, CHUNKS, MASK, CAUSAL,
        )  # fmt: skip
        top = larger(top, tl.reduce(s, 1, larger))  # one NaN makes the row NaN
    total = tl.zeros((BM, 16), tl.float32)
    acc = tl.zeros((BM, DV), tl.float32)
    block_total, block_acc = total, acc
    for begin in tl.range(0, last, BN):
        key = begin + tl.arange(0, BN)
        s = _scores(
            tile_q, from_k, from_mask, row, key, rows, keys, size, k_row, mask_row, mask_column,
            scale, CHUNKS, MASK, CAUSAL,
        )  # fmt: skip
        # The CPU reference, too, leaves out a key whose score overflowed to -inf.
        absent = s == float("-inf")
        p = tl.where(absent, -0.0, exp(s - top[:, None], True))
        total, acc, block_total, block_acc = add_keys(
            total, acc, block_total, block_acc, p, absent, from_v, key.to(tl.int64) * v_row,
            key < keys, v_size, (base - begin) & (_BLOCK - 1),
            MASK == _NO_MASK, CAUSAL or MASK != _NO_MASK,
        )  # fmt: skip
    total += block_total
    acc += block_acc
    whole = tl.reduce(total, 1, larger)  # its columns are equal
    none = top == float("-inf")
    divisor = tl.broadcast_to(tl.where(none, 1.0, whole)[:, None], (BM, DV))
    y = tl.where(none[:, None], 0.0, tl.div_rn(acc, divisor) + 0.0)
    at = (batch * rows + row.to(tl.int64)) * heads + head
    stored = (row[:, None] < rows) & (dv[None, :] < v_size)
    to = out + at[:, None] * v_size + dv[None, :]
    tl.store(to, rounded(y, out.dtype.element_ty), mask=stored)
    e = tl.where(none, float("-inf"), log(whole) + top)
    to = lse + (batch * heads + head) * rows + row
    tl.store(to, rounded(e, tl.float32), mask=row < rows)


attention_chains = RowKernel(_attention_kernel)
