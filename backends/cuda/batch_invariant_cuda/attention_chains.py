"""Attention in fp32 on CUDA: the order of the contract, the bits of the CPU reference.

Two passes over the keys: the exact maximum of the scores, then exp, denominator and weighted sum.
Every product is a chain of fp32 FMAs over ascending positions (Triton's IEEE dot), so a row depends
neither on the tile, nor on how many rows are computed together, nor on padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batch_invariant_cuda.explog import exp, log
from batch_invariant_cuda.row_launch import RowKernel
from batch_invariant_cuda.rows import larger, rounded

KEYS = 32  # of a tile
NO_MASK = 0
BOOL_MASK = 1
ADDITIVE_MASK = 2

_NO_MASK = tl.constexpr(NO_MASK)
_BOOL_MASK = tl.constexpr(BOOL_MASK)


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
    D: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Scores [BM, BN] in fp32, -inf where a key takes no part."""
    d = tl.arange(0, D)
    there = (key[None, :] < keys) & (d[:, None] < size)
    at = key.to(tl.int64)[None, :] * k_row + d[:, None]
    tile = tl.load(k + at, mask=there, other=0.0).to(tl.float32)
    s = tl.dot(q, tile, input_precision="ieee") * scale
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
        "mask_batch", "mask_head", "mask_row", "mask_column", "scale",
    ]
)  # fmt: skip
def _attention_kernel(
    q, k, v, mask, out, lse,
    heads, group, rows, keys, size, v_size, blocks,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_column, scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    block, head, batch = task % blocks, task // blocks % heads, task // blocks // heads
    row = (block * BM + tl.arange(0, BM)).to(tl.int32)
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    from_q = q + batch * q_batch + head * q_head
    from_k = k + batch * k_batch + head // group * k_head
    from_v = v + batch * v_batch + head // group * v_head
    from_mask = mask
    if MASK != _NO_MASK:
        from_mask = mask + batch * mask_batch + head * mask_head
    there = (row[:, None] < rows) & (d[None, :] < size)
    at = row.to(tl.int64)[:, None] * q_row + d[None, :]
    tile_q = tl.load(from_q + at, mask=there, other=0.0).to(tl.float32)
    last = keys
    if CAUSAL:
        last = tl.minimum(keys, (block * BM + BM).to(tl.int32))
    top = tl.full((BM,), float("-inf"), tl.float32)
    for begin in tl.range(0, last, BN):
        key = begin + tl.arange(0, BN)
        s = _scores(
            tile_q, from_k, from_mask, row, key, rows, keys, size, k_row, mask_row, mask_column,
            scale, D, MASK, CAUSAL,
        )  # fmt: skip
        top = larger(top, tl.reduce(s, 1, larger))  # one NaN makes the row NaN
    total = tl.zeros((BM, 16), tl.float32)
    acc = tl.zeros((BM, DV), tl.float32)
    ones = tl.full((BN, 16), 1.0, tl.float32)
    for begin in tl.range(0, last, BN):
        key = begin + tl.arange(0, BN)
        s = _scores(
            tile_q, from_k, from_mask, row, key, rows, keys, size, k_row, mask_row, mask_column,
            scale, D, MASK, CAUSAL,
        )  # fmt: skip
        # A key that takes no part weighs -0.0, which changes no chain of finite values. The CPU
        # reference, too, leaves out a key whose score overflowed to -inf.
        absent = s == float("-inf")
        p = tl.where(absent, -0.0, exp(s - top[:, None], True))
        total = tl.dot(p, ones, total, input_precision="ieee")
        held = (key[:, None] < keys) & (dv[None, :] < v_size)
        at_v = key.to(tl.int64)[:, None] * v_row + dv[None, :]
        tile_v = tl.load(from_v + at_v, mask=held, other=0.0).to(tl.float32)
        infinite = tl.max(tl.max(tl.where(tile_v - tile_v == 0.0, 0, 1), 1), 0)
        if infinite == 0:
            acc = tl.dot(p, tile_v, acc, input_precision="ieee")
        else:
            # 0 * inf is not 0: the same chains, key by key, without those that take no part.
            for j in tl.range(0, BN):
                chosen = (tl.arange(0, BN) == j)[None, :]
                weight = tl.sum(tl.where(chosen, p, 0.0), 1)
                skipped = tl.max(tl.where(chosen & absent, 1, 0), 1)
                at_j = from_v + (begin + j) * v_row.to(tl.int64) + dv
                value = tl.load(at_j, mask=(dv < v_size) & (begin + j < keys), other=0.0)
                more = tl.fma(
                    tl.broadcast_to(weight[:, None], (BM, DV)),
                    tl.broadcast_to(value.to(tl.float32)[None, :], (BM, DV)),
                    acc,
                )
                if CAUSAL or MASK != _NO_MASK:
                    acc = tl.where(skipped[:, None] != 0, acc, more)
                else:
                    acc = more
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
