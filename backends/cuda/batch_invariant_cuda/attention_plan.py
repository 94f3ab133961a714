"""What attention needs to know of a mask: where a row's keys begin, and whether they are one run.

Most masks let a row attend to one run of keys: causal ones, padding on either side, and both. Where
all rows of a mask's head begin at one key (rows that attend to nothing aside) and end anywhere, it
has a plan, by which `attention_hopper` walks blocks of keys without a look at the mask.

A plan is 1 + 2 * blocks + rows int32: the first key; for each block of 128 rows the keys behind
which its first and its last row end; and the key behind the last of each row, 0 for rows that
attend to nothing. A mask without a plan has -1 for a first key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batch_invariant_cuda.attention_merge import LOG2_E
from batch_invariant_cuda.row_launch import RowKernel

ROWS = 128  # of a tile of `attention_hopper`

_ROWS = tl.constexpr(ROWS)
_NOWHERE = tl.constexpr(2**31 - 1)
# Masks are also written as the lowest number of a dtype. A key this far below the row's largest
# addend is not where the row's keys begin; it is added all the same, before them. The CPU
# reference has the same number.
_FAR = tl.constexpr(1e4)


@triton.jit
def plan_length(rows):
    """int32 numbers of the plan of one head of a mask."""
    return 1 + 2 * ((rows + _ROWS - 1) // _ROWS) + rows


@triton.jit(do_not_specialize=["heads", "rows", "keys", "batch_", "head_", "row_", "column_"])
def _mask_kernel(
    mask, added, first, plan, heads, rows, keys, batch_, head_, row_, column_, BOOL: tl.constexpr
):
    """The first key that each row of a mask lets take part; 2^31 - 1 where there is none.

    And the end of its keys for a plan, -1 where they are not one run to which nothing is added.

    Where there is room for it, a boolean mask is also written as what is added to the scores: a
    load of single bytes among the operands of a product changes which terms the matrix units add
    in one step.
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
    begins = tl.full((1024,), _NOWHERE, tl.int32)
    ends = tl.zeros((1024,), tl.int32)
    count = tl.zeros((1024,), tl.int32)
    strange = tl.zeros((1024,), tl.int32)
    for begin in tl.range(0, keys, 1024):
        key = begin + columns
        there = key < keys
        m = tl.load(from_ + key.to(tl.int64) * column_, mask=there, other=0)
        if BOOL:
            here = m != 0
            on = here & there
            if added is not None:
                y = tl.where(here, 0.0, float("-inf")).to(added.dtype.element_ty)
                tl.store(added + task * keys + key, y, mask=there)
        else:
            m = m.to(tl.float32)
            here = (m != float("-inf")) & ~(m < least)
            on = (m == 0.0) & there
            strange = strange | (there & ~on & ~(m * LOG2_E == float("-inf"))).to(tl.int32)
        found = tl.minimum(found, tl.where(here & there, key, _NOWHERE))
        begins = tl.minimum(begins, tl.where(on, key, _NOWHERE))
        ends = tl.maximum(ends, tl.where(on, key + 1, 0))
        count += on.to(tl.int32)
    tl.store(first + task, tl.min(found, 0))
    if plan is not None:
        end = tl.max(ends, 0)
        number = tl.sum(count, 0)
        is_run = (number == 0) | (end - tl.min(begins, 0) == number)
        is_run = is_run & (tl.max(strange, 0) == 0)
        behind = plan + (task // rows + 1) * plan_length(rows)
        tl.store(behind - rows + row, tl.where(is_run, end, -1))


@triton.jit(do_not_specialize=["rows"])
def _plan_kernel(first, plan, rows):
    """The plan of one head of a mask, from the ends of its rows."""
    head = tl.program_id(0).to(tl.int64)
    blocks = (rows + _ROWS - 1) // _ROWS
    begin = plan + head * plan_length(rows)
    ends = begin + 1 + 2 * blocks
    columns = tl.arange(0, _ROWS)
    low = tl.full((_ROWS,), _NOWHERE, tl.int32)
    high = tl.full((_ROWS,), -1, tl.int32)
    runs = tl.full((_ROWS,), 1, tl.int32)
    for block in tl.range(0, blocks):
        row = block * _ROWS + columns
        there = row < rows
        end = tl.load(ends + row, mask=there, other=0)
        start = tl.load(first + head * rows + row, mask=there, other=0)
        low = tl.minimum(low, tl.where(end > 0, start, _NOWHERE))
        high = tl.maximum(high, tl.where(end > 0, start, -1))
        runs = tl.where(end < 0, 0, runs)
        tl.store(begin + 1 + 2 * block, tl.min(tl.where(there, end, _NOWHERE), 0))
        tl.store(begin + 2 + 2 * block, tl.max(end, 0))
    start = tl.maximum(tl.max(high, 0), 0)
    is_one = (tl.min(low, 0) >= start) & (tl.min(runs, 0) == 1)
    tl.store(begin, tl.where(is_one, start, -1))


prepare_mask = RowKernel(_mask_kernel)
plan_rows = RowKernel(_plan_kernel)


def empty_plan(first: torch.Tensor) -> torch.Tensor:
    """Memory for the plans of a mask whose rows have these first keys, [batch, heads, rows]."""
    batch, heads, rows = first.shape
    length = 1 + 2 * -(-rows // ROWS) + rows
    return torch.empty(batch, heads, length, dtype=torch.int32, device=first.device)
