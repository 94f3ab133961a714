"""Attention over sequences in fp32 on CUDA: the order of the contract, as in `attention_chains`.

Two passes over the keys that some row of a tile sees: the exact maximum of the scores, then exp,
denominator and weighted sum over blocks of keys that count from the sequence's first; the sink
last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batch_invariant_cuda.attention_chains import KEY_BLOCK, add_keys, load_queries, products
from batch_invariant_cuda.explog import exp, log
from batch_invariant_cuda.row_launch import RowKernel
from batch_invariant_cuda.rows import larger, rounded
from batch_invariant_cuda.varlen_spans import keys_of, places, sequence_of_tile, walk

_BLOCK = tl.constexpr(KEY_BLOCK)


@triton.jit
def _scores(
    q, k, key, low, high, table, begin, b, end, size, columns, page_size, pages,
    k_batch, k_page, k_row, scale, cap, CHUNKS: tl.constexpr, CAP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Scores [BM, BN] in fp32, -inf where a key takes no part."""
    there = key < end
    at = places(
        key, there, begin, b, table, columns, page_size, pages, k_batch, k_page, k_row, UNIT
    )
    s = products(q, k, at, there, size, CHUNKS) * scale
    if CAP:
        # tanh t = 1 - 2 / (e^2t + 1)
        twice = 2.0 * tl.div_rn(s, tl.full(s.shape, cap, tl.float32))
        two = tl.full(s.shape, 2.0, tl.float32)
        s = (1.0 - tl.div_rn(two, exp(twice, False) + 1.0)) * cap
    takes_part = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
    return tl.where(takes_part, s, float("-inf"))


@triton.jit(
    do_not_specialize=[
        "sequences", "queries", "tokens", "heads", "group", "capacity", "size", "v_size",
        "columns", "page_size", "pages", "window", "q_batch", "q_head", "q_row", "k_batch",
        "k_page", "k_head", "k_row", "v_batch", "v_page", "v_head", "v_row", "lse_batch",
        "lse_head", "scale", "cap",
    ]
)  # fmt: skip
def _attention_kernel(
    q, k, v, sinks, cu_q, cu_k, seq_lens, left_pad, table, out, lse,
    sequences, queries, tokens, heads, group, capacity, size, v_size,
    columns, page_size, pages, window, q_batch, q_head, q_row, k_batch, k_page, k_head, k_row,
    v_batch, v_page, v_head, v_row, lse_batch, lse_head, scale, cap,
    BM: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // group
    kv_head = tl.program_id(0) % kv_heads
    b, number, q_begin, count = sequence_of_tile(
        cu_q, tl.program_id(0) // kv_heads, sequences, queries, tokens, group, BM
    )
    begin, first, end = keys_of(cu_k, seq_lens, left_pad, b, sequences, capacity)
    index = number * BM + tl.arange(0, BM)
    row = index // group
    head = kv_head * group + index % group
    valid = row < count
    low, high = walk(end - count, row, first, end, window, CAUSAL, WINDOW)
    low = tl.where(valid, low, 2**31 - 1)
    high = tl.where(valid, high, 0)
    dv = tl.arange(0, DV)
    at = b.to(tl.int64) * q_batch + (q_begin + row).to(tl.int64) * q_row
    at = (at + head.to(tl.int64) * q_head) * UNIT
    tile_q = load_queries(q, at, valid, size, CHUNKS)
    from_k = k + kv_head.to(tl.int64) * k_head * UNIT
    from_v = v + kv_head.to(tl.int64) * v_head * UNIT
    to_key = tl.max(high, 0)
    # Not beyond the end where no row is valid: loads ahead of the loop would overflow their place.
    from_key = tl.minimum(tl.min(low, 0), to_key)
    from_key = first + (from_key - first) // BN * BN  # tiles do not straddle blocks
    top = tl.full((BM,), float("-inf"), tl.float32)
    for at_key in tl.range(from_key, to_key, BN):
        key = at_key + tl.arange(0, BN)
        s = _scores(
            tile_q, from_k, key, low, high, table, begin, b, end, size, columns, page_size, pages,
            k_batch, k_page, k_row, scale, cap, CHUNKS, CAP, UNIT,
        )  # fmt: skip
        top = larger(top, tl.reduce(s, 1, larger))  # one NaN makes the row NaN
    is_request = valid & (b < sequences)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=is_request, other=float("-inf")).to(tl.float32)
        top = larger(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((BM, 16), tl.float32)
    acc = tl.zeros((BM, DV), tl.float32)
    block_total, block_acc = total, acc
    for at_key in tl.range(from_key, to_key, BN):
        key = at_key + tl.arange(0, BN)
        s = _scores(
            tile_q, from_k, key, low, high, table, begin, b, end, size, columns, page_size, pages,
            k_batch, k_page, k_row, scale, cap, CHUNKS, CAP, UNIT,
        )  # fmt: skip
        absent = s == float("-inf")
        p = tl.where(absent, -0.0, exp(s - base[:, None], True))
        there = key < end
        v_at = places(
            key, there, begin, b, table, columns, page_size, pages, v_batch, v_page, v_row, UNIT
        )
        total, acc, block_total, block_acc = add_keys(
            total, acc, block_total, block_acc, p, absent, from_v, v_at, there, v_size,
            tl.where((at_key - first) % _BLOCK == 0, row * 0, BN), True, True,
        )  # fmt: skip
    total += block_total
    acc += block_acc
    whole = tl.reduce(total, 1, larger)  # its columns are equal
    if sinks is not None:
        whole = whole + tl.where(is_request, exp(sink - base, True), 0.0)
    none = top == float("-inf")
    divisor = tl.broadcast_to(tl.where(none, 1.0, whole)[:, None], (BM, DV))
    y = tl.where(none[:, None], 0.0, tl.div_rn(acc, divisor) + 0.0)
    # `queries` is 0 where they are packed.
    place = (b.to(tl.int64) * queries + q_begin + row) * heads + head
    there = valid[:, None] & (dv[None, :] < v_size)
    tl.store(out + place[:, None] * v_size + dv[None, :], rounded(y, tl.float32), mask=there)
    e = tl.where(none, float("-inf"), log(whole) + top)
    to = lse + b.to(tl.int64) * lse_batch + head.to(tl.int64) * lse_head + q_begin + row
    tl.store(to, rounded(e, tl.float32), mask=valid)


sequences_in_chains = RowKernel(_attention_kernel)
