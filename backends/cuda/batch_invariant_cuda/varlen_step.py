"""Attention over sequences in bf16 and fp16 on Hopper for a few rows: `attention_step` by lengths.

A tile is up to 16 rows of a sequence, of all query heads that share a key head. Its sequence is
found by every program for itself. Keys lie at an offset or in pages, whose numbers are loaded a
block ahead of their copies. How many blocks a program takes follows the sequence's own length.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from batch_invariant_cuda.attention_hopper import KEYS
from batch_invariant_cuda.attention_merge import EXTRA
from batch_invariant_cuda.attention_step import (
    SLOTS,
    buffers,
    finish,
    leave,
    load_rows,
    merge,
    rows_layout,
    scores_layout,
    store_weights,
    sum_of,
)
from batch_invariant_cuda.varlen_pages import blocks_of, boxes, copy_block, pages_of
from batch_invariant_cuda.varlen_scores import capped, first_block

_KEYS = gl.constexpr(KEYS)
_SLOTS = gl.constexpr(SLOTS)
_EXTRA = gl.constexpr(EXTRA)
_PIECE = gl.constexpr(16)  # rows of values looked at together: more would not fit the registers
_LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _length(lengths, at, most):
    return gl.minimum(gl.maximum(gl.load(lengths + at).to(gl.int32), 0), most)


@gluon.jit
def _queries(
    cu_q, tile, sequences, queries, tokens, group, SHORT: gl.constexpr, ROWS: gl.constexpr
):  # fmt: skip
    """As `varlen_spans.sequence_of_tile`, without a loop over dependent loads."""
    if cu_q is None:
        per = (queries * group + ROWS - 1) // ROWS
        return tile // per, tile % per, 0, queries
    elif SHORT:  # noqa: RET505
        begin = _length(cu_q, tile, tokens)
        count = gl.maximum(_length(cu_q, tile + 1, tokens) - begin, 0)
        return tile, 0, begin, gl.where(count * group > ROWS, 0, count)
    else:
        LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
        lanes = gl.arange(0, 512, LAYOUT)
        found = gl.zeros([512], gl.int32, LAYOUT)
        for begin in range(0, sequences + 1, 512):
            at = begin + lanes
            there = at <= sequences
            first = gl.load(cu_q + at, mask=there, other=0).to(gl.int64) * group // ROWS + at
            found += (there & (first <= tile)).to(gl.int32)
        b = gl.maximum(gl.sum(found, 0) - 1, 0)
        begin = _length(cu_q, b, tokens)
        end = tokens
        if b < sequences:
            end = gl.maximum(_length(cu_q, b + 1, tokens), begin)
        first = gl.load(cu_q + b).to(gl.int64) * group // ROWS + b
        return b, gl.maximum(tile - first, 0).to(gl.int32), begin, end - begin


@gluon.jit
def _keys(cu_k, seq_lens, left_pad, b, sequences, capacity):
    """As `varlen_spans.keys_of`, and the end counted from the first key."""
    begin = 0
    first = 0
    end = 0
    if b < sequences:
        end = capacity
        if cu_k is not None:
            begin = _length(cu_k, b, capacity)
            end = gl.maximum(_length(cu_k, b + 1, capacity) - begin, 0)
        if seq_lens is not None:
            end = _length(seq_lens, b, capacity)
        if left_pad is not None:
            first = gl.minimum(_length(left_pad, b, capacity), end)
    return begin + first, end - first


@gluon.jit
def _careful(
    part, p, v, vbuf, pbuf, batch, v_batch, v_page, v_row, table, columns, page_size, pages, from_,
    first, low, last, least, most, PAGE: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """The weighted sum of a block once more, with odd values by the keys that take part alone.

    0 * inf is not 0. Where only values behind the keys of all rows are odd, nothing else is done.
    """
    D: gl.constexpr = part.shape[0]
    LAYOUT: gl.constexpr = part.type.layout
    LOAD: gl.constexpr = rows_layout(D)
    row = gl.arange(0, _PIECE, gl.SliceLayout(1, LOAD))
    strange = gl.zeros([_PIECE, D], gl.int32, LOAD)
    gl.thread_barrier()
    for i in gl.static_range(_KEYS // _PIECE):
        rows = vbuf.slice(i * _PIECE, _PIECE)
        tile = rows.load(LOAD)
        wide = tile.to(gl.float32)
        fine = wide - wide == 0.0
        used = (from_ + i * _PIECE + row < most)[:, None]
        if WINDOW:
            used = used & (from_ + i * _PIECE + row >= least)[:, None]
        strange = strange | (used & ~fine).to(gl.int32)
        rows.store(gl.where(fine, tile, 0.0))
    odd = gl.max(gl.max(strange, 1), 0)
    fence_async_shared()
    gl.thread_barrier()
    zero = gl.zeros([D, part.shape[1]], gl.float32, LAYOUT)
    part = warpgroup_mma(
        vbuf.permute((1, 0)), pbuf.permute((1, 0)), zero, use_acc=False, is_async=True
    )
    part = warpgroup_mma_wait(0, deps=[part])
    if odd != 0:
        index = gl.arange(0, _KEYS, gl.SliceLayout(1, LAYOUT))
        column = gl.arange(0, D, gl.SliceLayout(1, LAYOUT))
        p = p.to(v.dtype.element_ty).to(gl.float32)
        for j in range(0, gl.minimum(most - from_, _KEYS)):
            weight = gl.sum(gl.where((index == j)[:, None], p, 0.0), 0)
            at = batch.to(gl.int64) * v_batch + (first + from_ + j).to(gl.int64) * v_row
            if table is not None:
                key = from_ + j
                page = gl.load(table + batch.to(gl.int64) * columns + key // page_size)
                page = gl.minimum(gl.maximum(page.to(gl.int64), 0), pages - 1)
                at = page * v_page + (key % page_size).to(gl.int64) * v_row
            value = gl.load(v + at * 8 + column).to(gl.float32)
            seen = (value - value != 0.0)[:, None] & (from_ + j < last)[None, :]
            if WINDOW:
                seen = seen & (from_ + j >= low)[None, :]
            more = weight[None, :] * (zero + value[:, None])
            part = gl.where(seen, part + more, part)
    return part


@gluon.jit(
    do_not_specialize=[
        "sequences", "queries", "tokens", "heads", "group", "capacity", "blocks", "runs",
        "columns", "page_size", "pages", "window", "q_batch", "q_head", "q_row", "v_batch",
        "v_page", "v_head", "v_row", "lse_batch", "lse_head",
    ]
)  # fmt: skip
def sequences_step(
    kd, vd, q, v, sinks, cu_q, cu_k, seq_lens, left_pad, table, out, lse, parts,
    sequences, queries, tokens, heads, group, capacity, blocks, runs, columns, page_size, pages,
    window, q_batch, q_head, q_row, v_batch, v_page, v_head, v_row, lse_batch, lse_head,
    scale: gl.float32, cap: gl.float32,
    D: gl.constexpr, ROWS: gl.constexpr, PAGE: gl.constexpr, CAUSAL: gl.constexpr,
    SPLIT: gl.constexpr, SHORT: gl.constexpr, ONE: gl.constexpr, WINDOW: gl.constexpr,
    CAP: gl.constexpr,
):  # fmt: skip
    """One tile; SPLIT: one of `runs` runs of its blocks. Strides of q and v come divided by 8.

    SHORT: packed sequences whose queries are one tile, by their number; others are left alone.
    ONE: a box is a page.
    """
    S_LAYOUT: gl.constexpr = scores_layout(ROWS)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    LOAD: gl.constexpr = rows_layout(D)
    ring = boxes(kd, _SLOTS, D, PAGE)
    held_blocks = blocks_of(ring, _SLOTS, D)
    qbuf, pbufs = buffers(kd.dtype, D, ROWS, 1)
    pbuf = pbufs.index(0)
    full = gl.allocate_shared_memory(gl.int64, [_SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(_SLOTS):
        mbarrier.init(full.index(i), count=1)
    piece = gl.program_id(0) % runs
    pair = gl.program_id(0) // runs
    kv_heads = heads // group
    kv_head = pair % kv_heads
    b, number, q_begin, queries_here = _queries(
        cu_q, pair // kv_heads, sequences, queries, tokens, group, SHORT, ROWS
    )
    first, keys = _keys(cu_k, seq_lens, left_pad, b, sequences, capacity)
    # The keys that row 0 of the sequence sees, and those that some and all rows of the tile do.
    seen = keys
    most = keys
    fewest = keys
    row_of = number * ROWS // group
    until = gl.minimum((number * ROWS + ROWS - 1) // group + 1, queries_here)
    if CAUSAL:
        seen = keys - queries_here + 1
        most = gl.minimum(keys, seen + until - 1)
        fewest = gl.minimum(keys, seen + row_of)
    wanted = gl.where(row_of < queries_here, gl.maximum(most + _KEYS - 1, 0) // _KEYS, 0)
    begin = 0
    # The first key that some row of the tile sees.
    least = 0
    if WINDOW:
        begin = gl.maximum(first_block(fewest, window, wanted), 0)
        least = fewest - window
    run = (wanted - begin + runs - 1) // runs
    begin += piece * run
    count = gl.maximum(gl.minimum(run, wanted - begin), 0)
    batch = gl.minimum(b, gl.maximum(sequences - 1, 0))
    of = batch
    if cu_k is not None:
        of = 0
    fence_async_shared()
    gl.thread_barrier()
    per = page_size // PAGE
    held = pages_of(table, batch, begin, columns, per, PAGE, ONE)
    ahead = pages_of(table, batch, begin + 1, columns, per, PAGE, ONE)
    if count > 0:
        copy_block(kd, ring, 0, full, held, of, kv_head, first, begin, per, pages, D, PAGE, ONE)
        copy_block(vd, ring, 1, full, held, of, kv_head, first, begin, per, pages, D, PAGE, ONE)
    if count > 1:
        copy_block(
            kd, ring, 2, full, ahead, of, kv_head, first, begin + 1, per, pages, D, PAGE, ONE
        )
    index = number * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LOAD))
    head = (kv_head * group + index % group).to(gl.int64)
    place = (q_begin + index // group).to(gl.int64)
    start = 0
    if cu_q is None:
        start = batch
    at = (start.to(gl.int64) * q_batch + head * q_head + place * q_row) * 8
    load_rows(q + at, index // group < queries_here, qbuf)
    fence_async_shared()
    gl.thread_barrier()
    index = number * ROWS + gl.arange(0, ROWS, COLUMN)
    row_in = index // group
    head = kv_head * group + index % group
    valid = row_in < queries_here
    last = gl.full([ROWS], keys, gl.int32, COLUMN)
    if CAUSAL:
        last = gl.minimum(last, seen + row_in)
    low = last * 0
    if WINDOW:
        low = seen + row_in - window
    place = ((start * queries + q_begin).to(gl.int64) + row_in) * heads + head
    top = gl.full([ROWS], float("-inf"), gl.float32, COLUMN)
    total = gl.zeros([ROWS], gl.float32, COLUMN)
    acc = gl.zeros([D, ROWS], gl.float32, S_LAYOUT)
    zero = gl.zeros([_KEYS, ROWS], gl.float32, S_LAYOUT)
    level = gl.zeros([D, ROWS], gl.float32, S_LAYOUT)
    v += kv_head.to(gl.int64) * v_head * 8
    by = scale
    if CAP:
        by = 1.0
    for j in range(0, count):
        step = 2 * j
        block = begin + j
        later = pages_of(table, batch, block + 2, columns, per, PAGE, ONE)
        mbarrier.wait(full.index(step % _SLOTS), step // _SLOTS & 1)
        k_tile = held_blocks.index(step % _SLOTS).reshape([_KEYS, D])
        s = warpgroup_mma(k_tile, qbuf.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        gl.thread_barrier()
        if j + 1 < count:
            copy_block(
                vd, ring, step % _SLOTS, full, ahead, of, kv_head, first, block + 1, per, pages,
                D, PAGE, ONE,
            )  # fmt: skip
        key = block * _KEYS + gl.arange(0, _KEYS, gl.SliceLayout(1, S_LAYOUT))
        if CAP:
            s = capped(s, scale, cap)
        s = gl.where(key[:, None] < last[None, :], s, float("-inf"))
        if WINDOW:
            s = gl.where(key[:, None] >= low[None, :], s, float("-inf"))
        next_top = gl.max(s, 0) * by
        base = gl.where(next_top == float("-inf"), 0.0, next_top)
        p = gl.exp2(s * by - base[None, :])
        store_weights(p, pbuf)
        fence_async_shared()
        step += 1
        mbarrier.wait(full.index(step % _SLOTS), step // _SLOTS & 1)
        v_tile = held_blocks.index(step % _SLOTS).reshape([_KEYS, D])
        gl.thread_barrier()
        part = warpgroup_mma(
            v_tile.permute((1, 0)), pbuf.permute((1, 0)), level, use_acc=False, is_async=True
        )
        next_total = sum_of(p)
        new_top = gl.maximum(top, next_top)
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, share = gl.exp2(top - base), gl.exp2(next_top - base)
        part = warpgroup_mma_wait(0, deps=[part])
        if WINDOW or block * _KEYS + _KEYS > fewest:  # noqa: SIM102  (a look that costs, and what it found)
            if gl.max(gl.max(gl.where(part - part == 0.0, 0, 1), 1), 0) != 0:
                part = _careful(
                    part, p, v, v_tile, pbuf, of, v_batch, v_page, v_row, table, columns,
                    page_size, pages, block * _KEYS, first, low, last, least, most, PAGE, WINDOW,
                )  # fmt: skip
        gl.thread_barrier()
        if j + 2 < count:
            copy_block(
                kd, ring, step % _SLOTS, full, later, of, kv_head, first, block + 2, per, pages,
                D, PAGE, ONE,
            )  # fmt: skip
        ahead = later
        if SPLIT:
            to = parts + (place * blocks + block) * (D + _EXTRA)
            leave(to, next_top, next_total, part, valid)
        else:
            total = gl.fma(next_total, share, total * shrink)
            acc = gl.fma(part, level + share[None, :], acc * shrink[None, :])
            top = new_top
    # Not earlier: what is launched while all multiprocessors are full would crowd on few.
    gdc_launch_dependents()
    if not SPLIT:
        if sinks is not None:
            own = valid & (b < sequences)
            sink = gl.load(sinks + head, mask=own, other=float("-inf")).to(gl.float32) * _LOG2_E
            top, total, acc = merge(top, total, acc, sink, gl.where(own, 1.0, 0.0), level)
        at = lse + start.to(gl.int64) * lse_batch + head.to(gl.int64) * lse_head
        finish(out + place * D, at + q_begin + row_in, top, total, acc, valid)
