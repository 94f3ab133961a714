"""Where a tile of queries, and the keys of its sequence, lie: read from lengths on the device.

A tile holds BM rows of the query heads that share a key head: row 0 of each head, row 1 of each,
and so on. Packed queries have tiles counted so that sequence b begins at tile
cu_seqlens_q[b] * group // BM + b, found by bisection; what lies behind the last sequence is one
more, without keys. Nobody on the host has seen these lengths, so each is clamped to its tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batch_invariant_cuda.attention_merge import BLOCK

_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def _length(lengths, at, most):
    return tl.minimum(tl.maximum(tl.load(lengths + at).to(tl.int32), 0), most)


@triton.jit
def _last_before(cuts, at, sequences, group, BM: tl.constexpr):
    """The last sequence whose first tile is not behind tile `at`; rows are tiles where BM is 1."""
    low = at * 0
    high = low + sequences
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(cuts + middle).to(tl.int64) * group // BM
        if BM > 1:
            begins += middle
        is_before = begins <= at
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle - 1)
    return low


@triton.jit
def rows_of(cu_q, b, sequences, tokens):
    """The first row of a packed sequence, and how many there are."""
    from_ = _length(cu_q, b, tokens)
    to = from_ * 0 + tokens
    if b < sequences:
        to = tl.maximum(_length(cu_q, b + 1, tokens), from_)
    return from_, to - from_


@triton.jit
def sequence_of_tile(cu_q, tile, sequences, queries, tokens, group, BM: tl.constexpr):
    """The sequence of a tile, the tile's number in it, its first row in storage, its queries."""
    if cu_q is None:
        per = (queries * group + BM - 1) // BM
        b = tile // per
        number = tile % per
        from_ = tile * 0
        count = tile * 0 + queries
    else:
        b = _last_before(cu_q, tile, sequences, group, BM)
        number = tile - (tl.load(cu_q + b).to(tl.int64) * group // BM).to(tl.int32) - b
        from_, count = rows_of(cu_q, b, sequences, tokens)
    return b, number, from_, count


@triton.jit
def sequence_of_row(cu_q, row, sequences, queries, tokens):
    """The sequence of a row in storage, its number in it, and the sequence's queries."""
    if cu_q is None:
        b = row // queries
        number = row % queries
        count = row * 0 + queries
    else:
        b = _last_before(cu_q, row, sequences, 1, 1)
        from_, count = rows_of(cu_q, b, sequences, tokens)
        number = row - from_
    return b, number, count


@triton.jit
def keys_of(cu_k, seq_lens, left_pad, b, sequences, capacity):
    """Where the keys of a sequence begin in packed storage, its first key, and its end."""
    begin = b * 0
    first = b * 0
    end = b * 0
    if b < sequences:
        end = capacity + b * 0
        if cu_k is not None:
            begin = _length(cu_k, b, capacity)
            end = tl.maximum(_length(cu_k, b + 1, capacity) - begin, 0)
        if seq_lens is not None:
            end = _length(seq_lens, b, capacity)
        if left_pad is not None:
            first = tl.minimum(_length(left_pad, b, capacity), end)
    return begin, first, end


@triton.jit
def places(
    key, there, begin, b, table, columns, page_size, pages, batch, page, row, UNIT: tl.constexpr
):  # fmt: skip
    """Offsets of keys of sequence b, from the strides of a batch, a page and a row.

    Strides come divided by UNIT, so that the compiler knows what they are multiples of.
    """
    if table is None:
        at = b.to(tl.int64) * batch + (begin + key).to(tl.int64) * row
    else:
        of = tl.load(table + b.to(tl.int64) * columns + key // page_size, mask=there, other=0)
        of = tl.minimum(tl.maximum(of.to(tl.int64), 0), pages - 1)
        at = of * page + (key % page_size).to(tl.int64) * row
    return at * UNIT


@triton.jit
def walk(position, row, first, end, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """The keys that a row sees, [low, high); at least as many as none."""
    low = first + row * 0
    high = end + row * 0
    if CAUSAL:
        high = tl.minimum(end, position + row + 1)
        if WINDOW:
            low = tl.maximum(low, position + row + 1 - window)
    return low, tl.maximum(high, low)
