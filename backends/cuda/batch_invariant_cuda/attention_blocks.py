"""Attention in bf16 and fp16 on CUDA: matrix units, softmax over fixed blocks of keys.

Order, for every query row on its own. Positions count from the first key that the row attends to,
in blocks of 128. Of each block alone: the scores by the matrix units' steps over the head size,
their maximum, the weights and their sum (halves folded down to 8 columns, neighbours, halves), the
weighted sum of the values by the matrix units from weights rounded to the input dtype. Blocks are
merged in ascending order in fp32, rescaled to the maximum so far; then one division and one
rounding. Blocks of keys that take no part change nothing.

So a row depends neither on the tile of queries, nor on which programs compute its blocks, nor on
masked keys before or behind its own: padding on either side, packing, a sliding window, a cache.
`attention_hopper`, `attention_step` and `attention_alone` compute the same on Hopper, faster.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batch_invariant_cuda.attention_merge import BLOCK, EXTRA, LOG2_E, finish, merge
from batch_invariant_cuda.attention_plan import plan_length
from batch_invariant_cuda.row_launch import RowKernel

_BLOCK = tl.constexpr(BLOCK)
_EXTRA = tl.constexpr(EXTRA)
_NOWHERE = tl.constexpr(2**31 - 1)

# Who looks after infinite and NaN values of masked keys: nobody (no key is masked, or none can be
# odd); the loop itself; a second launch, if the first one marks an odd result. The loop itself
# needs too many registers for many rows.
NOBODY, INSIDE, MARK = range(3)
_INSIDE, _MARK = tl.constexpr(INSIDE), tl.constexpr(MARK)


@triton.jit
def block_sum(p):
    """The sum of each row of p [BM, 128], one way in any layout: two terms at a time."""
    BM: tl.constexpr = p.shape[0]
    p = tl.sum(tl.reshape(p, (BM, 2, 64)), 1)
    p = tl.sum(tl.reshape(p, (BM, 2, 32)), 1)
    p = tl.sum(tl.reshape(p, (BM, 2, 16)), 1)
    p = tl.sum(tl.reshape(p, (BM, 2, 8)), 1)
    p = tl.sum(tl.reshape(p, (BM, 4, 2)), 2)
    p = tl.sum(tl.reshape(p, (BM, 2, 2)), 1)
    return tl.sum(p, 1)


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
def has_odd(acc):
    """Whether one of the numbers is infinite or NaN.

    In one dimension: Triton 3.6 cannot compile a second reduction of what tensor memory held.
    """
    return tl.max(tl.ravel(tl.where(acc - acc == 0.0, 0, 1), can_reorder=True), 0) != 0


@triton.jit
def _block(
    from_, tile_q, k, v, mask, row, active, keys, size, v_size, k_row, v_row,
    mask_rows, mask_column, scale,
    DV: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, FULL: tl.constexpr,
    WHOLE: tl.constexpr, CARE: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and weighted sum of one block of keys. FULL: every row attends to all of them.

    CARE: masked keys may have infinite or NaN values. See `_attention_kernel`.
    """
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
    if MASKED:
        at = mask_rows[:, None] + key.to(tl.int64)[None, :] * mask_column
        added = tl.load(mask + at, mask=takes_part, other=0.0).to(tl.float32)
        added = added * LOG2_E
        takes_part = takes_part & (added != float("-inf"))
    if not FULL:
        s = tl.where(takes_part, s, float("-inf"))
    # Scores are s * scale + added: one rounding, also where a mask adds nothing. They are rounded
    # before their maximum is taken off, so that the largest weight is one at any magnitude.
    u = tl.fma(s, tl.full(s.shape, scale, tl.float32), added) if MASKED else s * scale
    top = tl.max(u, 1)
    p = tl.exp2(u - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = block_sum(p)
    p = p.to(v.dtype.element_ty)
    at = v + from_.to(tl.int64) * v_row + columns.to(tl.int64)[:, None] * v_row + dv[None, :]
    if FULL and WHOLE:
        tile_v = tl.load(at)
    elif WHOLE:
        tile_v = tl.load(at, mask=there[:, None], other=0.0)
    else:
        tile_v = tl.load(at, mask=there[:, None] & (dv[None, :] < v_size), other=0.0)
    acc = tl.dot(p, tile_v)
    if CARE == _INSIDE:  # noqa: SIM102  (a constexpr, and a number on the device)
        if has_odd(acc):
            acc = tl.dot(p, tl.where(tile_v - tile_v == 0.0, tile_v, 0.0))
            acc = _add_odd(acc, p, v, v_row, from_, keys, takes_part, v_size)
    return top, total, acc


@triton.jit
def _tile(
    task,
    q, k, v, mask, first, out, lse, parts, odd, plan,
    heads, group, rows, keys, size, v_size, tiles, blocks, run,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_column, first_batch, first_head, first_row, scale,
    BM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr, CARE: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """BM rows of the heads that share a key head: row 0 of each head, row 1 of each, ...

    SPLIT: `run` of the `blocks` of keys, to be put together with the others by `attention_merge`.
    plan: of the mask, where rows of heads that have one are computed elsewhere.
    CARE: who looks after odd values; MARK writes to `odd` whether a tile has odd results. Strides
    of q, k and v come divided by UNIT, so that the compiler knows what they are multiples of.
    """
    q_batch, q_head, q_row = q_batch * UNIT, q_head * UNIT, q_row * UNIT
    k_batch, k_head, k_row = k_batch * UNIT, k_head * UNIT, k_row * UNIT
    v_batch, v_head, v_row = v_batch * UNIT, v_head * UNIT, v_row * UNIT
    piece = 0
    if SPLIT:
        runs = (blocks + run - 1) // run
        piece = task % runs
        task = task // runs
    # The longest of the causal rows begin first.
    tile, pair = tiles - 1 - task % tiles, task // tiles
    kv_heads = heads // group
    kv_head, batch = (pair % kv_heads).to(tl.int64), (pair // kv_heads).to(tl.int64)
    index = tile * BM + tl.arange(0, BM)
    row = index // group
    head = kv_head * group + index % group
    valid = row < rows
    place = (batch * heads + head) * rows + row
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
        end = tl.minimum(keys, (tile * BM + BM - 1) // group + 1)
        full = tl.minimum(keys, tile * BM // group + 1)
    mask_rows = index.to(tl.int64)
    starts = tl.zeros((BM,), tl.int32)
    if MASKED:
        mask_rows = batch * mask_batch + head * mask_head + row.to(tl.int64) * mask_row
        at = batch * first_batch + head * first_head + row.to(tl.int64) * first_row
        starts = tl.load(first + at, mask=valid, other=_NOWHERE)
    left = tl.where(valid, starts, -1)
    if plan is not None:
        of = (batch * first_batch + head * first_head) // rows
        planned = tl.load(plan + of * plan_length(rows), mask=valid, other=0)
        left = tl.where(tl.min(planned, 0) >= 0, -1, left)
    marked = 0
    more = tl.max(left, 0) >= 0
    while more:
        # Rows whose keys begin at different places have their blocks at different places.
        start = tl.max(left, 0)
        active = (left == start) & valid
        begin = tl.minimum(start, keys)
        if MASKED:
            begin = begin % _BLOCK - _BLOCK
        last = end
        number = 0
        if SPLIT:
            number = piece * run
            begin = begin + number * _BLOCK
            last = begin + tl.minimum(run, blocks - number) * _BLOCK
            if CAUSAL:
                last = tl.minimum(last, end)
        stored = active[:, None] & (dv[None, :] < v_size)
        top = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, DV), tl.float32)
        middle = begin
        if not MASKED and not SPLIT:
            whole = tl.maximum(tl.minimum(full, last) - begin, 0) // _BLOCK
            middle = begin + whole * _BLOCK
            for block in tl.range(0, whole, num_stages=STAGES):
                next_top, next_total, next_acc = _block(
                    begin + block * _BLOCK, tile_q, from_k, from_v, mask, row, active, keys, size,
                    v_size, k_row, v_row, mask_rows, mask_column, scale,
                    DV, MASKED, False, True, WHOLE, 0,
                )  # fmt: skip
                top, total, acc = merge(top, total, acc, next_top, next_total, next_acc)
        for block in tl.range(0, (last - middle + _BLOCK - 1) // _BLOCK, num_stages=STAGES):
            next_top, next_total, next_acc = _block(
                middle + block * _BLOCK, tile_q, from_k, from_v, mask, row, active, keys, size,
                v_size, k_row, v_row, mask_rows, mask_column, scale,
                DV, MASKED, CAUSAL, False, WHOLE, CARE,
            )  # fmt: skip
            if SPLIT:
                to = parts + (place * blocks + number + block) * (DV + _EXTRA)
                tl.store(to[:, None] + dv[None, :], next_acc, mask=stored)
                tl.store(to + DV, next_top, mask=active)
                tl.store(to + DV + 1, next_total, mask=active)
            else:
                top, total, acc = merge(top, total, acc, next_top, next_total, next_acc)
        if not SPLIT:
            y, e = finish(top, total, acc)
            width = DV if WHOLE else v_size
            to = out + ((batch * rows + row) * heads + head) * width
            tl.store(to[:, None] + dv[None, :], y.to(out.dtype.element_ty), mask=stored)
            tl.store(lse + place, e, mask=active)
            if CARE == _MARK:
                strange = active[:, None] & (acc - acc != 0.0)
                marked = tl.maximum(marked, tl.max(tl.ravel(strange.to(tl.int32), True), 0))
        left = tl.where(active, -1, left)
        more = tl.max(left, 0) >= 0
    if CARE == _MARK:
        tl.store(odd + task, marked.to(tl.int8))


_NUMBERS = [
    "heads", "group", "rows", "keys", "size", "v_size", "tiles", "blocks", "run",
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
    "mask_batch", "mask_head", "mask_row", "mask_column",
    "first_batch", "first_head", "first_row", "scale",
]  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS)
def _attention_kernel(
    q, k, v, mask, first, out, lse, parts, odd, plan,
    heads, group, rows, keys, size, v_size, tiles, blocks, run,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_column, first_batch, first_head, first_row, scale,
    BM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr, CARE: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One tile, or one run of its keys."""
    _tile(
        tl.program_id(0), q, k, v, mask, first, out, lse, parts, odd, plan,
        heads, group, rows, keys, size, v_size, tiles, blocks, run,
        q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
        mask_batch, mask_head, mask_row, mask_column, first_batch, first_head, first_row, scale,
        BM, D, DV, MASKED, CAUSAL, WHOLE, SPLIT, CARE, STAGES, UNIT,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*_NUMBERS, "marks", "all_tiles"])
def _mend_kernel(
    q, k, v, mask, first, out, lse, parts, odd, plan,
    heads, group, rows, keys, size, v_size, tiles, blocks, run,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_column, first_batch, first_head, first_row, scale,
    marks, all_tiles,
    BM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr, CARE: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """All rows once more and carefully, if there is a mark in `odd`; mostly there is none."""
    found = 0
    for begin in tl.range(0, marks, 4096):
        at = begin + tl.arange(0, 4096)
        marked = tl.load(odd + at, mask=at < marks, other=0).to(tl.int32)
        found = tl.maximum(found, tl.max(marked, 0))
    if found != 0:
        for task in tl.range(tl.program_id(0), all_tiles, tl.num_programs(0)):
            _tile(
                task, q, k, v, mask, first, out, lse, parts, odd, plan,
                heads, group, rows, keys, size, v_size, tiles, blocks, run,
                q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
                mask_batch, mask_head, mask_row, mask_column, first_batch, first_head, first_row,
                scale, BM, D, DV, MASKED, CAUSAL, WHOLE, SPLIT, CARE, STAGES, UNIT,
            )  # fmt: skip


attention_blocks = RowKernel(_attention_kernel)
mend = RowKernel(_mend_kernel)
