"""Reductions over a dimension that is not the last, without a transposed copy.

A program holds the 1024 lanes of several neighbouring columns, adds in the order of `rows.py`, and
folds along the lanes. The bits are those of the same numbers laid out as a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batch_invariant_cuda.reduce_ops import finished, first_term, last_term, needs_mean
from batch_invariant_cuda.row_launch import RowKernel, aligned, unit_of
from batch_invariant_cuda.rows import FACTOR, FEW, LANES, SEGMENT, combine, rounded, take_turn, term

_LANES = tl.constexpr(LANES)
_SEGMENT = tl.constexpr(SEGMENT)
_DEPTH = tl.constexpr(SEGMENT // LANES)


@triton.jit
def _fold_columns(v, C: tl.constexpr, TERM: tl.constexpr):
    for _ in tl.static_range(0, 10):
        if v.shape[0] > 1:
            halves = tl.reshape(v, (2, v.shape[0] // 2, C))
            v = tl.reduce(halves, 0, _times) if TERM == FACTOR else tl.reduce(halves, 0, _plus)
    v = tl.reshape(v, (C,))
    if TERM == FACTOR:
        return v
    else:  # noqa: RET505  (Triton compiles what follows a plain return)
        return v + 0.0


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _times(a, b):
    return a * b


@triton.jit
def _terms(x, at, column, n, inner, shift, TERM: tl.constexpr):
    there = (at[:, None] < n) & (column[None, :] < inner)
    v = tl.load(x + at.to(tl.int64)[:, None] * inner + column[None, :], mask=there, other=0.0)
    return tl.where(there, term(v, shift, TERM), 1.0 if TERM == FACTOR else 0.0)


@triton.jit
def _column_total(x, column, n, inner, shift, L: tl.constexpr, C: tl.constexpr, TERM: tl.constexpr):
    lane = tl.arange(0, L)
    if L < _LANES:
        total = _terms(x, lane, column, n, inner, shift, TERM)
    else:
        total = tl.zeros((L, C), tl.float32) + (1.0 if TERM == FACTOR else 0.0)
        for begin in tl.range(0, n, _SEGMENT):
            part = _terms(x, lane + begin, column, n, inner, shift, TERM)
            for t in tl.range(1, _DEPTH):
                v = _terms(x, lane + begin + t * _LANES, column, n, inner, shift, TERM)
                part = combine(part, v, TERM)
            total = combine(total, part, TERM)
    return _fold_columns(total, C, TERM)


@triton.jit(do_not_specialize=["n", "inner_units", "size", "divisor"])
def _column_kernel(
    x,
    out,
    n,
    inner_units,
    size,
    divisor,
    OP: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    UNIT: tl.constexpr,
):
    take_turn()
    inner = inner_units * UNIT
    blocks = tl.cdiv(inner, C)
    task = tl.program_id(0)
    outer = (task // blocks).to(tl.int64)
    column = task % blocks * C + tl.arange(0, C)
    x += outer * n * inner
    shift = tl.zeros((1, C), tl.float32)
    if needs_mean(OP):
        mean = _column_total(x, column, n, inner, shift, L, C, first_term(OP))
        shift = tl.div_rn(mean, size)[None, :]
    total = _column_total(x, column, n, inner, shift, L, C, last_term(OP))
    y = finished(total, 0.0, size, divisor, OP)
    to = out + outer * inner + column
    tl.store(to, rounded(y, out.dtype.element_ty), mask=column < inner)


_columns = RowKernel(_column_kernel, overlaps=FEW.value)


def reduce_columns(
    op: int, x: torch.Tensor, out_dtype: torch.dtype, divisor: float
) -> torch.Tensor:
    """`reduce.reduce_rows` over the middle of contiguous x [outer, n, inner]: [outer * inner]."""
    outer, n, inner = x.shape
    out = torch.empty(outer * inner, dtype=out_dtype, device=x.device)
    lanes = min(LANES, triton.next_power_of_2(n))
    width = 32 if lanes < LANES else 16
    unit = unit_of(inner, aligned(x))
    _columns(
        outer * -(-inner // width),
        (x, out),
        (n, inner // unit, float(n), divisor),
        (op, lanes, width, unit),
        8,
        unit > 1,
    )
    return out
