"""Attention in bf16 and fp16 on CUDA: matrix units, online softmax over fixed blocks of keys.

Order, for every query row on its own. Positions count from the first key that the row attends to.
Chunks of 512 keys, in each of them blocks of 64, ascending: the scores by the matrix units' steps
over the head size, the new maximum, the rescaled denominator and weighted sum, the weights rounded
to the input dtype before both. Chunks are merged in ascending order in fp32, then one division and
one rounding. The denominator is a product with ones, because a reduction over a tile's columns
would follow its layout. Blocks of keys that take no part change nothing.

So a row depends neither on the tile of queries, nor on which programs compute its chunks, nor on
masked keys before or behind its own: padding on either side, packing, a sliding window, a cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batch_invariant_cuda.row_launch import RowKernel

BLOCK = 64  # keys
CHUNK = 512  # keys

_BLOCK = tl.constexpr(BLOCK)
_CHUNK = tl.constexpr(CHUNK)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_NOWHERE = tl.constexpr(2**31 - 1)
# Masks are also written as the lowest number of a dtype. A key this far below the row's largest
# addend is not where the row's keys begin; it is added all the same, before them.
_FAR = tl.constexpr(1e4)


@triton.jit(do_not_specialize=["heads", "rows", "keys", "batch_", "head_", "row_", "column_"])
def _mask_kernel(
    mask, added, first, heads, rows, keys, batch_, head_, row_, column_, BOOL: tl.constexpr
):
    """The first key that each row of a mask lets take part; 2^31 - 1 where there is none.

    A boolean mask is also written as what is added to the scores: a load of single bytes among the
    operands of a product changes which terms the matrix units add in one step.
    """
    task = tl.program_id(0).to(tl.int64)
    row, head, batch = task % rows, task // rows % heads, task // rows // heads
    from_ = mask + batch * batch_ + head * head_ + row * row_
    columns = tl.arange(0, 1024)
    least = float("-inf")
    if not BOOL:
        top = tl.full((1024,), float("-inf"), tl.float32)
        for begin in tl.range(0, keys, 1024):
            key = begin + columns
            m = tl.load(from_ + key.to(tl.int64) * column_, mask=key < keys, other=float("-inf"))
            top = tl.maximum(top, m.to(tl.float32))
        least = tl.max(top, 0) - _FAR
    found = tl.full((1024,), _NOWHERE, tl.int32)
    for begin in tl.range(0, keys, 1024):
        key = begin + columns
        m = tl.load(from_ + key.to(tl.int64) * column_, mask=key < keys, other=0)
        if BOOL:
            here = m != 0
            y = tl.where(here, 0.0, float("-inf")).to(added.dtype.element_ty)
            tl.store(added + task * keys + key, y, mask=key < keys)
        else:
            m = m.to(tl.float32)
            here = (m != float("-inf")) & ~(m < least)
        found = tl.minimum(found, tl.where(here & (key < keys), key, _NOWHERE))
    tl.store(first + task, tl.min(found, 0))


@triton.jit
def _merge(top, total, acc, next_top, next_total, next_acc):
    """Two runs of keys as one, the second behind the first: [BM], [BM, n] and [BM, DV] of each."""
    highest = tl.maximum(top, next_top)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    shrink, share = tl.exp2(top - base)[:, None], tl.exp2(next_top - base)[:, None]
    total = tl.fma(next_total, tl.broadcast_to(share, total.shape), total * shrink)
    acc = tl.fma(next_acc, tl.broadcast_to(share, acc.shape), acc * shrink)
    return highest, total, acc


@triton.jit
def _add_odd(acc, p, v, v_row, begin, keys, takes_part, v_size):
    """Adds infinite and NaN values by the keys that take part alone, since 0 * inf is not 0."""
    dv = tl.arange(0, acc.shape[1])
    for j in tl.range(0, _BLOCK):
        chosen = (tl.arange(0, _BLOCK) == j)[None, :]
        weight = tl.max(tl.where(chosen, p.to(tl.float32), 0.0), 1)
        there = tl.max(tl.where(chosen & takes_part, 1, 0), 1)
        held = (dv < v_size) & (begin + j >= 0) & (begin + j < keys)
        value = tl.load(v + (begin + j).to(tl.int64) * v_row + dv, mask=held, other=0.0)
        value = value.to(tl.float32)
        odd = (value - value != 0.0)[None, :] & (there[:, None] != 0)
        acc = tl.where(odd, acc + weight[:, None] * value[None, :], acc)
    return acc


@triton.jit
def _block(
    state, from_, tile_q, k, v, mask, row, active, begin, keys, size, v_size, k_row, v_row,
    mask_rows, mask_column, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, FULL: tl.constexpr, WHOLE: tl.constexpr,
    CAREFUL: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """The state after one more block of keys. FULL: every row attends to all of them."""
    top, total, acc, all_top, all_total, all_acc = state
    BM: tl.constexpr = tile_q.shape[0]
    DV: tl.constexpr = acc.shape[1]
    d, dv = tl.arange(0, tile_q.shape[1]), tl.arange(0, DV)
    columns = tl.arange(0, _BLOCK)
    key = from_ + columns
    there = key < keys
    if MASKED:
        there = there & (key >= 0)
    at = k + from_.to(tl.int64) * k_row + columns.to(tl.int64)[None, :] * k_row + d[:, None]
    if FULL and WHOLE:
        tile_k = tl.load(at)
    elif WHOLE:
        tile_k = tl.load(at, mask=there[None, :], other=0.0)
    else:
        tile_k = tl.load(at, mask=there[None, :] & (d[:, None] < size), other=0.0)
    s = tl.dot(tile_q, tile_k)
    takes_part = there[None, :] & active[:, None]
    if CAUSAL:
        takes_part = takes_part & (key[None, :] <= row[:, None])
    added = tl.zeros((BM, _BLOCK), tl.float32)
    if MASKED:
        at = mask_rows[:, None] + key.to(tl.int64)[None, :] * mask_column
        added = tl.load(mask + at, mask=takes_part, other=0.0).to(tl.float32)
        takes_part = takes_part & (added != float("-inf"))
        added = added * _LOG2_E
    if not FULL:
        s = tl.where(takes_part, s, float("-inf"))
    # Scores are s * scale + added: one rounding, also where a mask adds nothing.
    if MASKED:
        u = tl.fma(s, tl.full(s.shape, scale, tl.float32), added)
        highest = tl.maximum(top, tl.max(tl.where(takes_part, u, float("-inf")), 1))
    else:
        highest = tl.maximum(top, tl.max(s, 1) * scale)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    shrink = tl.exp2(top - base)[:, None]
    offset = added - base[:, None]
    p = tl.exp2(tl.fma(s, tl.full(s.shape, scale, tl.float32), offset)).to(v.dtype.element_ty)
    at = v + from_.to(tl.int64) * v_row + columns.to(tl.int64)[:, None] * v_row + dv[None, :]
    if FULL and WHOLE:
        tile_v = tl.load(at)
    elif WHOLE:
        tile_v = tl.load(at, mask=there[:, None], other=0.0)
    else:
        tile_v = tl.load(at, mask=there[:, None] & (dv[None, :] < v_size), other=0.0)
    ones = tl.full((_BLOCK, 16), 1.0, v.dtype.element_ty)
    total = tl.dot(p, ones, total * shrink)
    acc = acc * shrink
    if CAREFUL:
        finite = tile_v - tile_v == 0.0
        acc = tl.dot(p, tl.where(finite, tile_v, 0.0), acc)
        if tl.max(tl.max(tl.where(finite, 0, 1), 1), 0) != 0:
            acc = _add_odd(acc, p, v, v_row, from_, keys, takes_part, v_size)
    else:
        acc = tl.dot(p, tile_v, acc)
    top = highest
    if not ONE:  # noqa: SIM102  (a constexpr, and a number on the device)
        if (from_ - begin) % _CHUNK == _CHUNK - _BLOCK:
            all_top, all_total, all_acc = _merge(all_top, all_total, all_acc, top, total, acc)
            top, total, acc = _nothing(BM, DV)
    return top, total, acc, all_top, all_total, all_acc


@triton.jit
def _nothing(BM: tl.constexpr, DV: tl.constexpr):
    """Of no keys: maximum [BM], denominator [BM, 16] with equal columns, weighted sum [BM, DV]."""
    top = tl.full((BM,), float("-inf"), tl.float32)
    return top, tl.zeros((BM, 16), tl.float32), tl.zeros((BM, DV), tl.float32)


@triton.jit
def _walk(
    tile_q, k, v, mask, row, active, begin, full, end, keys, size, v_size, k_row, v_row,
    mask_rows, mask_column, scale,
    DV: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
    CAREFUL: tl.constexpr, ONE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_nothing` after the keys from begin to end; every row attends to those before `full`."""
    BM: tl.constexpr = tile_q.shape[0]
    state = _nothing(BM, DV) + _nothing(BM, DV)
    middle = begin
    if not MASKED and not CAREFUL and not (ONE and CAUSAL):  # few blocks: one pipeline
        blocks = tl.maximum(full - begin, 0) // _BLOCK
        middle = begin + blocks * _BLOCK
        for block in tl.range(0, blocks, num_stages=STAGES):
            state = _block(
                state, begin + block * _BLOCK, tile_q, k, v, mask, row, active, begin, keys, size,
                v_size, k_row, v_row, mask_rows, mask_column, scale,
                MASKED, False, True, WHOLE, False, ONE,
            )  # fmt: skip
    blocks = (end - middle + _BLOCK - 1) // _BLOCK
    for block in tl.range(0, blocks, num_stages=STAGES):
        state = _block(
            state, middle + block * _BLOCK, tile_q, k, v, mask, row, active, begin, keys, size,
            v_size, k_row, v_row, mask_rows, mask_column, scale,
            MASKED, CAUSAL, False, WHOLE, CAREFUL, ONE,
        )  # fmt: skip
    top, total, acc, all_top, all_total, all_acc = state
    if not ONE:
        top, total, acc = _merge(all_top, all_total, all_acc, top, total, acc)
    return top, total, acc


@triton.jit
def _finish(top, total, acc):
    """Results [BM, DV] and log-sum-exp [BM]; 0 and -inf for rows that attend to no key."""
    whole = tl.max(total, 1)  # its columns are equal
    none = whole == 0.0
    divisor = tl.where(none, 1.0, whole)[:, None]
    # + 0.0: blocks that change nothing make +0 of -0, and which are walked depends on the tile.
    y = acc * tl.div_rn(1.0, divisor) + 0.0
    e = tl.where(none, float("-inf"), (tl.log2(whole) + top) * _LN_2)
    return tl.where(none[:, None], 0.0, y), e


@triton.jit(
    do_not_specialize=[
        "heads", "group", "rows", "keys", "size", "v_size", "blocks", "chunks",
        "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
        "mask_batch", "mask_head", "mask_row", "mask_column",
        "first_batch", "first_head", "first_row", "scale",
    ]
)  # fmt: skip
def _attention_kernel(
    q, k, v, mask, first, out, lse, parts,
    heads, group, rows, keys, size, v_size, blocks, chunks,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_column, first_batch, first_head, first_row, scale,
    BM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr, ONE: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """BM rows of the heads that share a key head: row 0 of each head, row 1 of each, ...

    SPLIT: one chunk, to be put together with the others by `_combine_kernel`. Strides of q, k and v
    come divided by UNIT, so that the compiler knows what they are multiples of.
    """
    q_batch, q_head, q_row = q_batch * UNIT, q_head * UNIT, q_row * UNIT
    k_batch, k_head, k_row = k_batch * UNIT, k_head * UNIT, k_row * UNIT
    v_batch, v_head, v_row = v_batch * UNIT, v_head * UNIT, v_row * UNIT
    task = tl.program_id(0)
    chunk = 0
    if SPLIT:
        chunk = task % chunks
        task = task // chunks
    # The longest of the causal rows begin first.
    block, pair = blocks - 1 - task % blocks, task // blocks
    kv_heads = heads // group
    kv_head, batch = (pair % kv_heads).to(tl.int64), (pair // kv_heads).to(tl.int64)
    index = block * BM + tl.arange(0, BM)
    row = index // group
    head = kv_head * group + index % group
    valid = row < rows
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    from_k = k + batch * k_batch + kv_head * k_head
    from_v = v + batch * v_batch + kv_head * v_head
    there = valid[:, None]
    if not WHOLE:
        there = there & (d[None, :] < size)
    at = batch * q_batch + head * q_head + row.to(tl.int64) * q_row
    tile_q = tl.load(q + at[:, None] + d[None, :], mask=there, other=0.0)
    end = keys
    full = keys
    if CAUSAL:
        end = tl.minimum(keys, (block * BM + BM - 1) // group + 1)
        full = tl.minimum(keys, block * BM // group + 1)
    mask_rows = index.to(tl.int64)
    starts = tl.zeros((BM,), tl.int32)
    if MASKED:
        mask_rows = batch * mask_batch + head * mask_head + row.to(tl.int64) * mask_row
        at = batch * first_batch + head * first_head + row.to(tl.int64) * first_row
        starts = tl.load(first + at, mask=valid, other=_NOWHERE)
    left = tl.where(valid, starts, -1)
    more = tl.max(left, 0) >= 0
    while more:
        # Rows whose keys begin at different places have their blocks at different places.
        start = tl.max(left, 0)
        active = (left == start) & valid
        begin = tl.minimum(start, keys)
        if MASKED:
            begin = begin % _CHUNK - _CHUNK
        last = end
        if SPLIT:
            begin = begin + chunk * _CHUNK
            last = tl.minimum(end, begin + _CHUNK)
        top, total, acc = _walk(
            tile_q, from_k, from_v, mask, row, active, begin, tl.minimum(full, last), last, keys,
            size, v_size, k_row, v_row, mask_rows, mask_column, scale,
            DV, MASKED, CAUSAL, WHOLE, False, ONE, STAGES,
        )  # fmt: skip
        if CAUSAL or MASKED:  # noqa: SIM102
            if tl.max(tl.max(tl.where(acc - acc == 0.0, 0, 1), 1), 0) != 0:
                top, total, acc = _walk(
                    tile_q, from_k, from_v, mask, row, active, begin, begin, last, keys,
                    size, v_size, k_row, v_row, mask_rows, mask_column, scale,
                    DV, MASKED, CAUSAL, WHOLE, True, ONE, 1,
                )  # fmt: skip
        if SPLIT:
            place = ((batch * heads + head) * rows + row) * chunks + chunk
            to = parts + place * (v_size + 2)
            stored = active[:, None] & (dv[None, :] < v_size)
            tl.store(to[:, None] + dv[None, :], acc, mask=stored)
            tl.store(to + v_size, top, mask=active)
            tl.store(to + v_size + 1, tl.max(total, 1), mask=active)
        else:
            y, e = _finish(top, total, acc)
            width = DV if WHOLE else v_size
            to = out + ((batch * rows + row) * heads + head) * width
            stored = active[:, None] & (dv[None, :] < v_size)
            tl.store(to[:, None] + dv[None, :], y.to(out.dtype.element_ty), mask=stored)
            tl.store(lse + (batch * heads + head) * rows + row, e, mask=active)
        left = tl.where(active, -1, left)
        more = tl.max(left, 0) >= 0


@triton.jit(do_not_specialize=["heads", "rows", "chunks", "v_size"])
def _combine_kernel(parts, out, lse, heads, rows, chunks, v_size, DV: tl.constexpr):
    """One row from its chunks."""
    task = tl.program_id(0).to(tl.int64)
    row, head, batch = task % rows, task // rows % heads, task // rows // heads
    dv = tl.arange(0, DV)[None, :]
    one = tl.arange(0, 1)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1, 1), tl.float32)
    acc = tl.zeros((1, DV), tl.float32)
    at = parts + task * chunks * (v_size + 2)
    for _ in tl.range(0, chunks, loop_unroll_factor=4):
        next_acc = tl.load(at + dv, mask=dv < v_size, other=0.0)
        next_top = tl.load(at + v_size + one)
        next_total = tl.load(at + v_size + 1 + one)[:, None]
        top, total, acc = _merge(top, total, acc, next_top, next_total, next_acc)
        at += v_size + 2
    y, e = _finish(top, total, acc)
    to = out + ((batch * rows + row) * heads + head) * v_size
    tl.store(to + dv, y.to(out.dtype.element_ty), mask=dv < v_size)
    tl.store(lse + task + one, e)


prepare_mask = RowKernel(_mask_kernel)
attention_blocks = RowKernel(_attention_kernel)
combine = RowKernel(_combine_kernel)
