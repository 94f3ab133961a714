"""The kernels of `norm.py`: whole rows, and segments of rows whose statistics are known."""

from __future__ import annotations

import triton
import triton.language as tl

from batch_invariant_cuda.reduce_ops import RSTD, finished
from batch_invariant_cuda.row_launch import RowKernel
from batch_invariant_cuda.rows import (
    FEW,
    FEW_SEGMENTS,
    LANES,
    SEGMENT,
    SQUARE,
    SQUARED_DIFFERENCE,
    VALUE,
    fold,
    held_lanes,
    load_tile,
    rounded,
    store_tile,
    take_turn,
    walked_lanes,
)

_LANES = tl.constexpr(LANES)
_SEGMENT = tl.constexpr(SEGMENT)
_DEPTH = tl.constexpr(SEGMENT // LANES)


@triton.jit
def _load_sum(x, residual, at, there, RESIDUAL: tl.constexpr, AGAIN: tl.constexpr):
    """Elements of x, or of x + residual, in fp32.

    AGAIN: for the second time. The cache is told so where it has two tensors to keep.
    """
    hint: tl.constexpr = ("evict_first" if AGAIN else "evict_last") if RESIDUAL else ""
    v = tl.load(x + at, mask=there, other=0.0, eviction_policy=hint).to(tl.float32)
    if RESIDUAL:
        other = tl.load(residual + at, mask=there, other=0.0, eviction_policy=hint)
        v = v + other.to(tl.float32)
    return v


@triton.jit
def _affine(
    v,
    mean,
    rstd,
    weight,
    bias,
    CENTRED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
):
    """(v - mean) * rstd * weight + bias, of loaded elements."""
    if CENTRED:
        v = v - mean
    v = v * rstd
    if WEIGHT:
        v = v * weight.to(tl.float32)
    if BIAS:
        v = v + bias.to(tl.float32)
    return v


@triton.jit
def _parameter(
    p,
    first,
    column,
    there,
    spatial,
    GIVEN: tl.constexpr,
    GROUPED: tl.constexpr,
    KEPT: tl.constexpr = False,
):
    """Elements of a weight or bias; `first` is a group's first channel where GROUPED.

    KEPT: the cache is told to keep them.
    """
    at = first + column // spatial if GROUPED else column
    if GIVEN:
        hint: tl.constexpr = "evict_last" if KEPT else ""
        return tl.load(p + at, mask=there, other=0.0, eviction_policy=hint)
    else:  # noqa: RET505  (Triton compiles what follows a plain return)
        return 0.0


@triton.jit
def _held_parameter(
    p,
    first,
    columns,
    n,
    spatial,
    P: tl.constexpr,
    T: tl.constexpr,
    FULL: tl.constexpr,
    GIVEN: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """A weight or bias beside the tiles of a row."""
    found = ()
    for t in tl.static_range(T * P):
        column = t * columns.shape[0] + columns
        there = column < n
        if FULL or t < (T - 1) * P:
            there = column >= 0
        found = found + (_parameter(p, first, column, there, spatial, GIVEN, GROUPED),)  # noqa: RUF005
    return found


@triton.jit
def _segment_squares(
    x,
    residual,
    at,
    columns,
    left,
    mean,
    CENTRED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The lanes of a segment of which the first `left` elements exist, or WHOLE all."""
    part = tl.zeros((_LANES,), tl.float32)
    for t in tl.static_range(_DEPTH):
        column = t * _LANES + columns
        there = column >= 0 if WHOLE else column < left
        v = _load_sum(x, residual, at + column, there, RESIDUAL, False)
        if CENTRED:
            v = v - mean
        part += v * v if WHOLE else tl.where(there, v * v, 0.0)
    return part


@triton.jit
def _walked_squares(
    x, residual, at, columns, n, mean, CENTRED: tl.constexpr, RESIDUAL: tl.constexpr
):
    """The lanes of squares, or of squared differences, of the first n elements of a row."""
    lanes = tl.zeros((_LANES,), tl.float32)
    whole = n // _SEGMENT * _SEGMENT
    for start in tl.range(0, whole, _SEGMENT):
        lanes += _segment_squares(
            x, residual, at + start, columns, _SEGMENT, mean, CENTRED, RESIDUAL, True
        )
    if whole < n:
        lanes += _segment_squares(
            x, residual, at + whole, columns, n - whole, mean, CENTRED, RESIDUAL, False
        )
    return lanes


@triton.jit(do_not_specialize=["n_units", "variance_size", "groups", "spatial", "size", "eps"])
def _held_kernel(
    x,
    residual,
    weight,
    bias,
    out,
    total_out,
    mean_out,
    rstd_out,
    n_units,
    variance_size,
    groups,
    spatial,
    size,
    eps,
    CENTRED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PARTIAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    FULL: tl.constexpr,
    UNIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    take_turn()
    n = n_units * UNIT
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, L)
    at = row * n
    first = row % groups * (n // spatial) if GROUPED else row
    mean = 0.0
    tiles = ()
    for t in tl.static_range(T * P):
        v = load_tile(x + at, columns, n, t, T * P, FULL, 0.0, P).to(tl.float32)
        if RESIDUAL:
            v = v + load_tile(residual + at, columns, n, t, T * P, FULL, 0.0, P).to(tl.float32)
        tiles = tiles + (v,)  # noqa: RUF005
    if EARLY:
        weights = _held_parameter(weight, first, columns, n, spatial, P, T, FULL, WEIGHT, GROUPED)
        biases = _held_parameter(bias, first, columns, n, spatial, P, T, FULL, BIAS, GROUPED)
    if CENTRED:
        mean = fold(held_lanes(tiles, columns, n, mean, P, T, FULL, VALUE), VALUE)
        mean = tl.div_rn(mean, size)
        tl.store(mean_out + row, rounded(mean, tl.float32))
    if PARTIAL:
        squares = ()
        for t in tl.static_range(T * P):
            there = t * L + columns < variance_size
            squares = squares + (tl.where(there, tiles[t] * tiles[t], 0.0),)  # noqa: RUF005
        lanes = held_lanes(squares, columns, n, mean, P, T, FULL, VALUE)
    elif CENTRED:
        lanes = held_lanes(tiles, columns, n, mean, P, T, FULL, SQUARED_DIFFERENCE)
    else:
        lanes = held_lanes(tiles, columns, n, mean, P, T, FULL, SQUARE)
    total = fold(lanes, VALUE)
    rstd = finished(total, total, size, eps, RSTD)
    if CENTRED:
        tl.store(rstd_out + row, rounded(rstd, tl.float32))
    if not EARLY:
        weights = _held_parameter(weight, first, columns, n, spatial, P, T, FULL, WEIGHT, GROUPED)
        biases = _held_parameter(bias, first, columns, n, spatial, P, T, FULL, BIAS, GROUPED)
    for t in tl.static_range(T * P):
        y = _affine(tiles[t], mean, rstd, weights[t], biases[t], CENTRED, WEIGHT, BIAS)
        store_tile(out + at, columns, n, y, t, T * P, FULL, False, P)
        if RESIDUAL:
            store_tile(total_out + at, columns, n, tiles[t], t, T * P, FULL, False, P)


@triton.jit(do_not_specialize=["n_units", "variance_size", "groups", "spatial", "size", "eps"])
def _walked_kernel(
    x,
    residual,
    weight,
    bias,
    out,
    total_out,
    mean_out,
    rstd_out,
    n_units,
    variance_size,
    groups,
    spatial,
    size,
    eps,
    CENTRED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    UNIT: tl.constexpr,
):
    take_turn()
    n = n_units * UNIT
    columns = tl.arange(0, _LANES)
    row = tl.program_id(0).to(tl.int64)
    at = row * n
    first = row % groups * (n // spatial) if GROUPED else row
    mean = 0.0
    if CENTRED:
        mean = fold(walked_lanes(x + at, columns, n, mean, UNIT, VALUE), VALUE)
        mean = tl.div_rn(mean, size)
        tl.store(mean_out + row, rounded(mean, tl.float32))
    lanes = _walked_squares(x, residual, at, columns, variance_size, mean, CENTRED, RESIDUAL)
    total = fold(lanes, VALUE)
    rstd = finished(total, total, size, eps, RSTD)
    if CENTRED:
        tl.store(rstd_out + row, rounded(rstd, tl.float32))
    streamed: tl.constexpr = ".cs" if RESIDUAL else ""
    last = (n - 1) // _SEGMENT * _SEGMENT
    for back in tl.range(0, n, _SEGMENT):  # from the end, which the cache still has
        column = last - back + tl.arange(0, _SEGMENT)
        there = column < n
        v = _load_sum(x, residual, at + column, there, RESIDUAL, True)
        w = _parameter(weight, first, column, there, spatial, WEIGHT, GROUPED, RESIDUAL)
        b = _parameter(bias, first, column, there, spatial, BIAS, GROUPED)
        y = _affine(v, mean, rstd, w, b, CENTRED, WEIGHT, BIAS)
        y = rounded(y, out.dtype.element_ty)
        tl.store(out + at + column, y, mask=there, cache_modifier=streamed)
        if RESIDUAL:
            s = rounded(v, out.dtype.element_ty)
            tl.store(total_out + at + column, s, mask=there, cache_modifier=streamed)


@triton.jit(do_not_specialize=["n_units", "count", "groups", "spatial"])
def _segment_kernel(
    x,
    weight,
    bias,
    mean,
    rstd,
    out,
    n_units,
    count,
    groups,
    spatial,
    CENTRED: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    UNIT: tl.constexpr,
):
    take_turn(FEW_SEGMENTS)
    task = tl.program_id(0).to(tl.int64)
    row, segment = task // count, task % count
    n = n_units * UNIT
    column = segment * _SEGMENT + tl.arange(0, _SEGMENT)
    there = column < n
    first = row % groups * (n // spatial) if GROUPED else row
    centre = 0.0
    if CENTRED:
        centre = tl.load(mean + row)
    v = tl.load(x + row * n + column, mask=there, other=0.0).to(tl.float32)
    w = _parameter(weight, first, column, there, spatial, WEIGHT, GROUPED)
    b = _parameter(bias, first, column, there, spatial, BIAS, GROUPED)
    y = _affine(v, centre, tl.load(rstd + row), w, b, CENTRED, WEIGHT, BIAS)
    tl.store(out + row * n + column, rounded(y, out.dtype.element_ty), mask=there)


held = RowKernel(_held_kernel, overlaps=FEW.value, registers={8: 80})
held_sums = RowKernel(_held_kernel, overlaps=FEW.value)  # with a residual, which needs more
walked = RowKernel(_walked_kernel, overlaps=FEW.value)
segment = RowKernel(_segment_kernel, overlaps=FEW_SEGMENTS.value)
