"""Attention over sequences in bf16 and fp16 on CUDA: the order of `attention_blocks`, by position.

Blocks of 128 keys count from the first key of the sequence, whatever a row sees of them: so a query
has the same bits in a chunk of a prefill and in decode, at any place of the page table. The sink is
merged last. Rows that see no key of a block, and blocks that no row of a tile sees, change nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batch_invariant_cuda.attention_blocks import INSIDE, MARK, block_sum, has_odd
from batch_invariant_cuda.attention_merge import (
    BLOCK,
    EXTRA,
    LOG2_E,
    finish,
    merge,
    merge_blocks,
)
from batch_invariant_cuda.row_launch import RowKernel
from batch_invariant_cuda.rows import FEW, take_turn
from batch_invariant_cuda.varlen_spans import (
    keys_of,
    places,
    sequence_of_row,
    sequence_of_tile,
    walk,
)

_BLOCK, _EXTRA = tl.constexpr(BLOCK), tl.constexpr(EXTRA)
_INSIDE, _MARK = tl.constexpr(INSIDE), tl.constexpr(MARK)


@triton.jit
def _capped(s, scale, cap, CAP: tl.constexpr):
    """Scores in units of log 2; with CAP, scale is that of the argument of tanh."""
    u = s * scale
    if CAP:
        # tanh t = 1 - 2 / (e^2t + 1), divided to 2 ulp, as near as exp2 is.
        u = (1.0 - 2.0 / (tl.exp2(u) + 1.0)) * cap
    return u


@triton.jit
def _add_odd(acc, p, v, v_at, takes_part, v_size, there):
    """Adds infinite and NaN values by the keys that take part alone, since 0 * inf is not 0."""
    dv = tl.arange(0, acc.shape[1])
    columns = tl.arange(0, _BLOCK)
    for j in tl.range(0, _BLOCK):
        chosen = columns == j
        weight = tl.max(tl.where(chosen[None, :], p.to(tl.float32), 0.0), 1)
        seen = tl.max(tl.where(chosen[None, :] & takes_part, 1, 0), 1)
        at = tl.sum(tl.where(chosen, v_at, 0), 0)
        held = (dv < v_size) & (tl.max(tl.where(chosen & there, 1, 0), 0) != 0)
        value = tl.load(v + at + dv, mask=held, other=0.0).to(tl.float32)
        odd = (value - value != 0.0)[None, :] & (seen[:, None] != 0)
        acc = tl.where(odd, acc + weight[:, None] * value[None, :], acc)
    return acc


@triton.jit
def _block(
    from_, tile_q, k, v, low, high, table, begin, b, end, size, v_size, columns, page_size, pages,
    k_batch, k_page, k_row, v_batch, v_page, v_row, scale, cap,
    DV: tl.constexpr, CAP: tl.constexpr, FULL: tl.constexpr, CARE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and weighted sum of one block of keys. FULL: every row sees all of them."""
    d, dv = tl.arange(0, tile_q.shape[1]), tl.arange(0, DV)
    key = from_ + tl.arange(0, _BLOCK)
    there = key < end
    k_at = places(
        key, there, begin, b, table, columns, page_size, pages, k_batch, k_page, k_row, UNIT
    )
    v_at = places(
        key, there, begin, b, table, columns, page_size, pages, v_batch, v_page, v_row, UNIT
    )
    held = d[:, None] < size
    if not FULL:
        held = held & there[None, :]
    s = tl.dot(tile_q, tl.load(k + k_at[None, :] + d[:, None], mask=held, other=0.0))
    u = _capped(s, scale, cap, CAP)
    takes_part = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
    if not FULL:
        u = tl.where(takes_part, u, float("-inf"))
    top = tl.max(u, 1)
    p = tl.exp2(u - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = block_sum(p)
    p = p.to(v.dtype.element_ty)
    held = dv[None, :] < v_size
    if not FULL:
        held = held & there[:, None]
    tile_v = tl.load(v + v_at[:, None] + dv[None, :], mask=held, other=0.0)
    acc = tl.dot(p, tile_v)
    if CARE == _INSIDE:  # noqa: SIM102  (a constexpr, and a number on the device)
        if has_odd(acc):
            acc = tl.dot(p, tl.where(tile_v - tile_v == 0.0, tile_v, 0.0))
            acc = _add_odd(acc, p, v, v_at, takes_part, v_size, there)
    return top, total, acc


@triton.jit
def _with_sink(top, total, acc, sinks, head, there):
    """The sink as a last key that has no value."""
    if sinks is not None:
        sink = tl.load(sinks + head, mask=there, other=float("-inf")).to(tl.float32) * LOG2_E
        one = tl.where(there, 1.0, 0.0)
        top, total, acc = merge(top, total, acc, sink, one, tl.zeros(acc.shape, tl.float32))
    return top, total, acc


@triton.jit
def _tile(
    task,
    q, k, v, sinks, cu_q, cu_k, seq_lens, left_pad, table, out, lse, parts, odd,
    sequences, queries, tokens, heads, group, capacity, size, v_size, blocks, run,
    columns, page_size, pages, window, q_batch, q_head, q_row, k_batch, k_page, k_head, k_row,
    v_batch, v_page, v_head, v_row, lse_batch, lse_head, scale, cap,
    BM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, SPLIT: tl.constexpr, CARE: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One tile, or SPLIT: `run` of its blocks, which `_combine_kernel` merges.

    CARE: who looks after odd values of keys that take no part, as in `attention_blocks`.
    """
    piece = 0
    if SPLIT:
        runs = (blocks + run - 1) // run
        piece = task % runs
        task = task // runs
    kv_heads = heads // group
    kv_head = task % kv_heads
    b, number, q_begin, count = sequence_of_tile(
        cu_q, task // kv_heads, sequences, queries, tokens, group, BM
    )
    begin, first, end = keys_of(cu_k, seq_lens, left_pad, b, sequences, capacity)
    position = end - count
    index = number * BM + tl.arange(0, BM)
    row = index // group
    head = kv_head * group + index % group
    valid = row < count
    low, high = walk(position, row, first, end, window, CAUSAL, WINDOW)
    low = tl.where(valid, low, 2**31 - 1)
    high = tl.where(valid, high, 0)
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    stored = b.to(tl.int64) * queries + q_begin + row  # `queries` is 0 where they are packed
    at = b.to(tl.int64) * q_batch + (q_begin + row).to(tl.int64) * q_row
    at = (at + head.to(tl.int64) * q_head) * UNIT
    tile_q = tl.load(
        q + at[:, None] + d[None, :], mask=valid[:, None] & (d[None, :] < size), other=0.0
    )
    from_k = k + kv_head.to(tl.int64) * k_head * UNIT
    from_v = v + kv_head.to(tl.int64) * v_head * UNIT
    # Blocks from the first that some row sees, in their places from the sequence's first key.
    from_block = tl.maximum(tl.min(low, 0) - first, 0) // _BLOCK
    to_block = (tl.maximum(tl.max(high, 0) - first, 0) + _BLOCK - 1) // _BLOCK
    if SPLIT:
        from_block = tl.maximum(from_block, piece * run)
        to_block = tl.minimum(to_block, piece * run + run)
    to_block = tl.maximum(to_block, from_block)
    whole = from_block
    if not WINDOW and not SPLIT:
        fewest = tl.min(tl.where(valid, high, 2**31 - 1), 0)
        whole = tl.minimum(tl.maximum(fewest - first, 0) // _BLOCK, to_block)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DV), tl.float32)
    for block in tl.range(from_block, whole, num_stages=STAGES):
        next_top, next_total, next_acc = _block(
            first + block * _BLOCK, tile_q, from_k, from_v, low, high, table, begin, b, end,
            size, v_size, columns, page_size, pages, k_batch, k_page, k_row,
            v_batch, v_page, v_row, scale, cap, DV, CAP, True, 0, UNIT,
        )  # fmt: skip
        top, total, acc = merge(top, total, acc, next_top, next_total, next_acc)
    there = valid[:, None] & (dv[None, :] < v_size)
    place = stored * heads + head
    for block in tl.range(whole, to_block, num_stages=STAGES):
        next_top, next_total, next_acc = _block(
            first + block * _BLOCK, tile_q, from_k, from_v, low, high, table, begin, b, end,
            size, v_size, columns, page_size, pages, k_batch, k_page, k_row,
            v_batch, v_page, v_row, scale, cap, DV, CAP, False, CARE, UNIT,
        )  # fmt: skip
        if SPLIT:
            to = parts + (place * blocks + block) * (v_size + _EXTRA)
            tl.store(to[:, None] + dv[None, :], next_acc, mask=there)
            tl.store(to + v_size, next_top, mask=valid)
            tl.store(to + v_size + 1, next_total, mask=valid)
        else:
            top, total, acc = merge(top, total, acc, next_top, next_total, next_acc)
    if not SPLIT:
        top, total, acc = _with_sink(top, total, acc, sinks, head, valid & (b < sequences))
        y, e = finish(top, total, acc)
        to = out + place * v_size
        tl.store(to[:, None] + dv[None, :], y.to(out.dtype.element_ty), mask=there)
        to = lse + b.to(tl.int64) * lse_batch + head.to(tl.int64) * lse_head + q_begin + row
        tl.store(to, e, mask=valid)
        if CARE == _MARK:
            strange = there & (acc - acc != 0.0)
            tl.store(odd + task, tl.max(tl.max(strange.to(tl.int32), 1), 0).to(tl.int8))


_NUMBERS = [
    "sequences", "queries", "tokens", "heads", "group", "capacity", "size", "v_size", "blocks",
    "run", "columns", "page_size", "pages", "window", "q_batch", "q_head", "q_row", "k_batch",
    "k_page", "k_head", "k_row", "v_batch", "v_page", "v_head", "v_row", "lse_batch", "lse_head",
    "scale", "cap",
]  # fmt: skip


@triton.jit(do_not_specialize=[*_NUMBERS, "tiles", "marks"])
def _attention_kernel(
    q, k, v, sinks, cu_q, cu_k, seq_lens, left_pad, table, out, lse, parts, odd,
    sequences, queries, tokens, heads, group, capacity, size, v_size, blocks, run,
    columns, page_size, pages, window, q_batch, q_head, q_row, k_batch, k_page, k_head, k_row,
    v_batch, v_page, v_head, v_row, lse_batch, lse_head, scale, cap, tiles, marks,
    BM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, SPLIT: tl.constexpr, CARE: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr, MEND: tl.constexpr,
):  # fmt: skip
    """One tile or a run of its keys; MEND: the marked ones of `tiles` once more, carefully.

    marks: all of them if there is one among so many marks, which another kernel made; 0 where each
    tile has its own.
    """
    if not MEND:
        _tile(
            tl.program_id(0),
            q, k, v, sinks, cu_q, cu_k, seq_lens, left_pad, table, out, lse, parts, odd,
            sequences, queries, tokens, heads, group, capacity, size, v_size, blocks, run,
            columns, page_size, pages, window, q_batch, q_head, q_row, k_batch, k_page, k_head,
            k_row, v_batch, v_page, v_head, v_row, lse_batch, lse_head, scale, cap,
            BM, D, DV, CAUSAL, WINDOW, CAP, SPLIT, CARE, STAGES, UNIT,
        )  # fmt: skip
    else:
        some = 0
        for begin in tl.range(0, marks, 4096):
            at = begin + tl.arange(0, 4096)
            marked = tl.load(odd + at, mask=at < marks, other=0).to(tl.int32)
            some = tl.maximum(some, tl.max(marked, 0))
        last = tiles
        if marks != 0 and some == 0:
            last = 0
        for task in tl.range(tl.program_id(0), last, tl.num_programs(0)):
            marked = some
            if marks == 0:
                marked = tl.load(odd + task).to(tl.int32)
            if marked != 0:
                _tile(
                    task,
                    q, k, v, sinks, cu_q, cu_k, seq_lens, left_pad, table, out, lse, parts, odd,
                    sequences, queries, tokens, heads, group, capacity, size, v_size, blocks, run,
                    columns, page_size, pages, window, q_batch, q_head, q_row, k_batch, k_page,
                    k_head, k_row, v_batch, v_page, v_head, v_row, lse_batch, lse_head, scale, cap,
                    BM, D, DV, CAUSAL, WINDOW, CAP, SPLIT, CARE, STAGES, UNIT,
                )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "sequences", "queries", "tokens", "heads", "capacity", "v_size", "blocks", "window",
        "lse_batch", "lse_head",
    ]
)  # fmt: skip
def _combine_kernel(
    parts, sinks, cu_q, cu_k, seq_lens, left_pad, out, lse,
    sequences, queries, tokens, heads, capacity, v_size, blocks, window, lse_batch, lse_head,
    PART: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    BATCH: tl.constexpr,
):  # fmt: skip
    """PART columns of one row of one head from its blocks in memory."""
    take_turn()
    task = tl.program_id(0) // PARTS
    head, stored = task % heads, task // heads
    b, row, count = sequence_of_row(cu_q, stored, sequences, queries, tokens)
    _, first, end = keys_of(cu_k, seq_lens, left_pad, b, sequences, capacity)
    low, high = walk(end - count, row, first, end, window, CAUSAL, WINDOW)
    from_block = (low - first) // _BLOCK
    to_block = (high - first + _BLOCK - 1) // _BLOCK
    one, dv = tl.arange(0, 1), tl.program_id(0) % PARTS * PART + tl.arange(0, PART)
    held = dv < v_size
    mine = parts + task.to(tl.int64) * blocks * (v_size + _EXTRA)
    top, total, acc = merge_blocks(
        mine, v_size + _EXTRA, v_size, from_block, to_block, dv, held, BATCH
    )
    top, total, acc = _with_sink(top, total, acc, sinks, head + one, (b + one * 0) < sequences)
    y, e = finish(top, total, acc)
    to = out + task.to(tl.int64) * v_size + dv[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=held[None, :])
    place = stored
    if cu_q is None:
        place = row
    if tl.program_id(0) % PARTS == 0:
        at = b.to(tl.int64) * lse_batch + head.to(tl.int64) * lse_head + place
        tl.store(lse + at + one, e)


sequences_in_blocks = RowKernel(_attention_kernel)
combine_sequences = RowKernel(_combine_kernel, overlaps=FEW.value)
