"""Rows that are few and long: their segments on many programs, then put together in order.

The lanes of every segment go to a workspace in fp32 and are added in ascending order by a second
launch, so the bits are those of one program that walks the row. A workspace belongs to one call:
streams, threads and CUDA graphs share nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batch_invariant.stock import stock
from batch_invariant_cuda.row_launch import Plan, RowKernel
from batch_invariant_cuda.rows import (
    FEW_SEGMENTS,
    LANES,
    SEGMENT,
    combine,
    is_far,
    is_near,
    larger,
    near_term,
    range_of,
    segment_lanes,
    smaller,
    stepped_lanes,
    take_turn,
)

_LANES = tl.constexpr(LANES)
_SEGMENT = tl.constexpr(SEGMENT)

_MANY = 64  # segments whose lanes one program can add up without being missed elsewhere
_PART = 64  # lanes of one program, where there are more

NO_SHIFT = tl.constexpr(0)
ROW_SHIFT = tl.constexpr(1)
TOP_SHIFT = tl.constexpr(2)
FINITE_TOP_SHIFT = tl.constexpr(3)


@triton.jit
def top_of(tops, row, segments, SEGMENTS: tl.constexpr, FINITE: tl.constexpr):
    """The maximum of a row from those of its segments; with FINITE, 0 in place of infinity."""
    index = tl.arange(0, SEGMENTS)
    at = tops + row * 2 * segments + index
    top = tl.reduce(tl.load(at, mask=index < segments, other=float("-inf")), 0, larger)
    if FINITE:
        top = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    return top


@triton.jit
def near_of(tops, row, segments, SEGMENTS: tl.constexpr):
    """`is_near` of a row from the extremes of its segments."""
    index = tl.arange(0, SEGMENTS)
    at = tops + (row * 2 + 1) * segments + index
    bottom = tl.reduce(tl.load(at, mask=index < segments, other=float("inf")), 0, smaller)
    return is_near(top_of(tops, row, segments, SEGMENTS, False), bottom)


@triton.jit
def row_shift(shift, row, tops, SHIFT: tl.constexpr, SEGMENTS: tl.constexpr):
    """What is taken off every element of a row before its term is formed."""
    if SHIFT == ROW_SHIFT:
        return tl.load(shift + row)
    elif SHIFT == TOP_SHIFT:  # noqa: RET505  (Triton compiles what follows a plain return)
        return top_of(shift, row, tops, SEGMENTS, False)
    elif SHIFT == FINITE_TOP_SHIFT:
        return top_of(shift, row, tops, SEGMENTS, True)
    else:
        return 0.0


@triton.jit(do_not_specialize=["n_units", "segments"])
def _top_kernel(x, tops, n_units, segments, UNIT: tl.constexpr):
    take_turn(FEW_SEGMENTS)
    task = tl.program_id(0).to(tl.int64)
    row, segment = task // segments, task % segments
    n = n_units * UNIT
    columns = tl.arange(0, _SEGMENT)
    left = n - segment * _SEGMENT
    v = tl.load(
        x + row * n + segment * _SEGMENT + columns, mask=columns < left, other=float("-inf")
    ).to(tl.float32)
    to = tops + row * 2 * segments + segment
    largest, smallest = range_of(v, tl.where(columns < left, v, float("inf")))
    tl.store(to, largest)
    tl.store(to + segments, smallest)


@triton.jit(do_not_specialize=["n_units", "segments", "tops"])
def _lanes_kernel(
    x,
    shift,
    lanes,
    n_units,
    segments,
    tops,
    TERM: tl.constexpr,
    SHIFT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    UNIT: tl.constexpr,
):
    take_turn(FEW_SEGMENTS)
    task = tl.program_id(0).to(tl.int64)
    row, segment = task // segments, task % segments
    n = n_units * UNIT
    columns = tl.arange(0, _LANES)
    by = row_shift(shift, row, tops, SHIFT, SEGMENTS)
    from_ = x + row * n + segment * _SEGMENT
    left = n - segment * _SEGMENT
    near = True
    if is_far(TERM):
        near = near_of(shift, row, tops, SEGMENTS)
    if near:
        v = segment_lanes(from_, columns, left, by, False, near_term(TERM))
    else:
        v = stepped_lanes(from_, columns, left, by, TERM)
    tl.store(lanes + task * _LANES + columns, v)


@triton.jit(do_not_specialize=["segments"])
def _add_up_kernel(lanes, total, segments, TERM: tl.constexpr, PART: tl.constexpr):
    parts: tl.constexpr = _LANES // PART
    take_turn(FEW_SEGMENTS)
    task = tl.program_id(0).to(tl.int64)
    row, part = task // parts, task % parts
    columns = part * PART + tl.arange(0, PART)
    from_ = lanes + row * segments * _LANES + columns
    v = tl.load(from_)
    for segment in tl.range(1, segments, loop_unroll_factor=8):
        v = combine(v, tl.load(from_ + segment * _LANES), TERM)
    tl.store(total + row * _LANES + columns, v)


_top = RowKernel(_top_kernel, overlaps=FEW_SEGMENTS.value)
_lanes = RowKernel(_lanes_kernel, overlaps=FEW_SEGMENTS.value)
_add_up = RowKernel(_add_up_kernel, overlaps=FEW_SEGMENTS.value)


def segments_of(n: int) -> int:
    """The number of segments of a row."""
    return -(-n // SEGMENT)


def tops(x: torch.Tensor, shape: Plan) -> torch.Tensor:
    """Maxima and minima [rows, 2, m] of parts of the rows of x [rows, n], in fp32; m <= 1024.

    The maxima are NaN where there is one; the minima leave NaN out.
    """
    rows, n = x.shape
    segments = segments_of(n)
    out = torch.empty(rows, 2, segments, dtype=torch.float32, device=x.device)
    _top(rows * segments, (x, out), (n // shape.unit, segments), (shape.unit,), 8, shape.wide)
    if segments <= LANES:
        return out
    largest = stock("amax", "CUDA")(out[:, 0], [1], False)
    smallest = stock("amin", "CUDA")(out[:, 1], [1], False)
    return torch.stack([largest, smallest], 1).unsqueeze(2)


def lanes(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    kind: int,
    term: int,
    shape: Plan,
) -> torch.Tensor:
    """The lanes [rows, m, 1024] of x [rows, n] in fp32, to be added over m in ascending order.

    shift: [rows] or the result of `tops`, as `kind` says.
    """
    rows, n = x.shape
    segments = segments_of(n)
    out = torch.empty(rows, segments, LANES, dtype=torch.float32, device=x.device)
    tops = 1 if shift is None or shift.dim() == 1 else shift.size(2)
    _lanes(
        rows * segments,
        (x, shift if shift is not None else x, out),
        (n // shape.unit, segments, tops),
        (term, kind, triton.next_power_of_2(tops), shape.unit),
        4,
        shape.wide,
    )
    if segments <= _MANY:
        return out
    total = torch.empty(rows, 1, LANES, dtype=torch.float32, device=x.device)
    _add_up(rows * (LANES // _PART), (out, total), (segments,), (term, _PART), 2)
    return total
