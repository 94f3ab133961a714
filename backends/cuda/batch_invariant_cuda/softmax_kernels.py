"""The kernels of `softmax.py`: rows that are held, rows that are walked, segments, derivatives."""

from __future__ import annotations

import triton
import triton.language as tl

from batch_invariant_cuda import segments
from batch_invariant_cuda.explog import exp, log, near_div
from batch_invariant_cuda.row_launch import RowKernel
from batch_invariant_cuda.rows import (
    AHEAD,
    FEW,
    FEW_SEGMENTS,
    LANES,
    SEGMENT,
    exponential,
    fold,
    held_lanes,
    held_range,
    is_near,
    load_row,
    load_tile,
    row_total,
    store_tile,
    take_turn,
    term,
    walked_lanes,
    walked_range,
)

_LANES = tl.constexpr(LANES)
_SEGMENT = tl.constexpr(SEGMENT)
_DEPTH = tl.constexpr(SEGMENT // LANES)


@triton.jit
def _divided(e, total, reciprocal, BITS: tl.constexpr, NEAR: tl.constexpr):
    """e / total for results of BITS bits."""
    if BITS == 16:
        return e * reciprocal
    elif NEAR:  # noqa: RET505  (Triton compiles what follows a plain return)
        return near_div(e, total, reciprocal)
    else:
        return tl.div_rn(e, total)


@triton.jit
def _output(x, top, total, reciprocal, LOG: tl.constexpr, BITS: tl.constexpr, NEAR: tl.constexpr):
    """softmax from the total, or log_softmax from its logarithm."""
    if LOG:
        return (x.to(tl.float32) - top) - total
    else:  # noqa: RET505
        e = term(x, top, exponential(BITS, NEAR))
        return _divided(e, total, reciprocal, BITS, NEAR)


@triton.jit(do_not_specialize=["n_units"])
def _held_kernel(
    x,
    out,
    n_units,
    LOG: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    FULL: tl.constexpr,
    UNIT: tl.constexpr,
):
    take_turn()
    n = n_units * UNIT
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, L)
    to = out + row * n
    tiles = load_row(x + row * n, columns, n, P, T, FULL, float("-inf"))
    top, bottom = held_range(tiles, columns, n, P, T, FULL)
    near = is_near(top, bottom)
    if near:
        _held_row(tiles, to, columns, n, top, LOG, P, T, FULL, True)
    else:
        _held_row(tiles, to, columns, n, top, LOG, P, T, FULL, False)


@triton.jit
def _held_row(
    tiles,
    to,
    columns,
    n,
    top,
    LOG: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    FULL: tl.constexpr,
    NEAR: tl.constexpr,
):
    bits: tl.constexpr = to.dtype.element_ty.primitive_bitwidth
    kind: tl.constexpr = exponential(bits, NEAR)
    if LOG:
        total = log(fold(held_lanes(tiles, columns, n, top, P, T, FULL, kind), 0))
        for t in tl.static_range(T * P):
            y = _output(tiles[t], top, total, total, True, bits, NEAR)
            store_tile(to, columns, n, y, t, T * P, FULL, NEAR, P)
    else:
        each = ()
        for t in tl.static_range(T * P):
            each = each + (term(tiles[t], top, kind),)  # noqa: RUF005
        total = fold(held_lanes(each, columns, n, top, P, T, FULL, 0), 0)
        reciprocal = tl.div_rn(1.0, total)
        for t in tl.static_range(T * P):
            y = _divided(each[t], total, reciprocal, bits, NEAR)
            store_tile(to, columns, n, y, t, T * P, FULL, NEAR, P)


@triton.jit
def _walked_outputs(x, out, n, top, total, reciprocal, LOG: tl.constexpr, WIDE: tl.constexpr):
    """Results from the end of a row, which the cache still has."""
    whole = n // _SEGMENT * _SEGMENT
    if whole < n:
        _walked_output(x, out, whole, n, top, total, reciprocal, LOG, True, False)
    if WIDE:
        for back in tl.range(_SEGMENT, whole + 1, _SEGMENT, num_stages=AHEAD):
            _walked_output(x, out, whole - back, n, top, total, reciprocal, LOG, True, True)
    else:
        for back in tl.range(_SEGMENT, whole + 1, _SEGMENT):
            _walked_output(x, out, whole - back, n, top, total, reciprocal, LOG, True, True)


@triton.jit
def _walked_output(
    x,
    out,
    start,
    n,
    top,
    total,
    reciprocal,
    LOG: tl.constexpr,
    NEAR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    columns = tl.arange(0, _SEGMENT)
    v = load_tile(x + start, columns, n - start, 0, 1, WHOLE, float("-inf"))
    bits: tl.constexpr = out.dtype.element_ty.primitive_bitwidth
    y = _output(v, top, total, reciprocal, LOG, bits, NEAR)
    store_tile(out + start, columns, n - start, y, 0, 1, WHOLE, NEAR)


@triton.jit(do_not_specialize=["n_units"])
def _walked_kernel(x, out, n_units, LOG: tl.constexpr, UNIT: tl.constexpr):
    take_turn()
    n = n_units * UNIT
    columns = tl.arange(0, _LANES)
    row = tl.program_id(0).to(tl.int64)
    from_, to = x + row * n, out + row * n
    top, bottom = walked_range(from_, n)
    near = is_near(top, bottom)
    bits: tl.constexpr = out.dtype.element_ty.primitive_bitwidth
    if near:
        lanes = walked_lanes(from_, columns, n, top, UNIT, exponential(bits, True))
    else:
        lanes = walked_lanes(from_, columns, n, top, UNIT, exponential(bits, False))
    total = fold(lanes, 0)
    reciprocal = tl.div_rn(1.0, total)
    if LOG:
        total = log(total)
    # From the end, which the cache still has.
    if near:
        if UNIT == 1:
            _walked_outputs(from_, to, n, top, total, reciprocal, LOG, False)
        else:
            _walked_outputs(from_, to, n, top, total, reciprocal, LOG, True)
    else:
        for back in tl.range(0, n, _SEGMENT):
            at = (n - 1) // _SEGMENT * _SEGMENT - back
            _walked_output(from_, to, at, n, top, total, reciprocal, LOG, False, False)


@triton.jit(do_not_specialize=["n_units", "count", "tops"])
def _segment_kernel(
    x,
    top,
    total,
    out,
    n_units,
    count,
    tops,
    LOG: tl.constexpr,
    TOPS: tl.constexpr,
    UNIT: tl.constexpr,
):
    take_turn(FEW_SEGMENTS)
    task = tl.program_id(0).to(tl.int64)
    row, segment = task // count, task % count
    n = n_units * UNIT
    columns = tl.arange(0, _SEGMENT)
    left = n - segment * _SEGMENT
    at = row * n + segment * _SEGMENT
    best = segments.top_of(top, row, tops, TOPS, False)
    near_of_row = segments.near_of(top, row, tops, TOPS)
    v = tl.load(x + at + columns, mask=columns < left, other=float("-inf"))
    whole = tl.load(total + row)
    reciprocal = tl.div_rn(1.0, whole)
    bits: tl.constexpr = out.dtype.element_ty.primitive_bitwidth
    if LOG or near_of_row:
        y = _output(v, best, whole, reciprocal, LOG, bits, True)
    else:
        y = _output(v, best, whole, reciprocal, LOG, bits, False)
    store_tile(out + at, columns, left, y, 0, 1, False, False)


@triton.jit(do_not_specialize=["n_units"])
def _backward_kernel(
    g,
    y,
    out,
    n_units,
    LOG: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    FULL: tl.constexpr,
    UNIT: tl.constexpr,
):
    take_turn()
    n = n_units * UNIT
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, L)
    from_g, from_y, to = g + row * n, y + row * n, out + row * n
    zero = 0.0
    gs = load_row(from_g, columns, n, P, T, FULL, 0.0)
    ys = load_row(from_y, columns, n, P, T, FULL, 0.0)
    if LOG:
        total = row_total(gs, from_g, columns, n, zero, P, T, FULL, UNIT, 0)
    elif T > 0:
        products = ()
        for t in tl.static_range(T * P):
            v = gs[t].to(tl.float32) * ys[t].to(tl.float32)
            products = products + (v,)  # noqa: RUF005
        lanes = held_lanes(products, columns, n, zero, P, T, FULL, 0)
        total = fold(lanes, 0)
    else:
        lanes = tl.zeros((_LANES,), tl.float32)
        for start in tl.range(0, n, _SEGMENT):
            part = tl.zeros((_LANES,), tl.float32)
            for t in tl.static_range(_DEPTH):
                vg = load_tile(from_g + start, columns, n - start, t, 0, False, 0.0)
                vy = load_tile(from_y + start, columns, n - start, t, 0, False, 0.0)
                part += vg.to(tl.float32) * vy.to(tl.float32)
            lanes += part
        total = fold(lanes, 0)
    for t in tl.static_range(T * P):
        store_tile(to, columns, n, _gradient(gs[t], ys[t], total, LOG), t, T * P, FULL, False, P)
    if T == 0:
        for start in tl.range(0, n, _LANES):
            vg = load_tile(from_g + start, columns, n - start, 0, 1, False, 0.0)
            vy = load_tile(from_y + start, columns, n - start, 0, 1, False, 0.0)
            v = _gradient(vg, vy, total, LOG)
            store_tile(to + start, columns, n - start, v, 0, 1, False, False)


@triton.jit
def _gradient(g, y, total, LOG: tl.constexpr):
    g = g.to(tl.float32)
    y = y.to(tl.float32)
    if LOG:
        return g - exp(y, False) * total
    else:  # noqa: RET505
        return (g - total) * y


held = RowKernel(_held_kernel, overlaps=FEW.value, registers={8: 80})
walked = RowKernel(_walked_kernel, overlaps=FEW.value, registers={8: 64})
segment = RowKernel(_segment_kernel, overlaps=FEW_SEGMENTS.value)
backward = RowKernel(_backward_kernel, overlaps=FEW.value)
