"""softmax, log_softmax and their derivatives on CUDA, in the order of `rows.py`.

The exact maximum, exp of the differences by `explog.py`, their lane sum, one division or one
logarithm, one rounding: the bits of the CPU reference. float64 runs the same order in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from batch_invariant.backend import Kernel
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.dims import from_rows_along, normalize, rows_along
from batch_invariant.ops.row_order import ROW_ORDER, lane_sum
from batch_invariant.stock import stock
from batch_invariant_cuda import segments
from batch_invariant_cuda.explog import exp, log, near_div, near_exp
from batch_invariant_cuda.reduce import cast, finish
from batch_invariant_cuda.reduce_ops import EXP_SUM, LOG_EXP_SUM, TERM_OF
from batch_invariant_cuda.row_launch import Plan, RowKernel, plan_of
from batch_invariant_cuda.rows import (
    EXPONENTIAL,
    LANES,
    NEAR_EXPONENTIAL,
    SEGMENT,
    fold,
    held_lanes,
    is_near,
    load_row,
    load_tile,
    row_range,
    row_total,
    store_tile,
)

_LANES = tl.constexpr(LANES)
_SEGMENT = tl.constexpr(SEGMENT)
_DEPTH = tl.constexpr(SEGMENT // LANES)


@triton.jit
def _exponential(x, top, NEAR: tl.constexpr):
    v = x.to(tl.float32) - top
    if NEAR:
        return near_exp(v)
    else:  # noqa: RET505  (Triton compiles what follows a plain return)
        return exp(v, True)


@triton.jit
def _divided(e, total, reciprocal, NEAR: tl.constexpr):
    if NEAR:
        return near_div(e, total, reciprocal)
    else:  # noqa: RET505
        return tl.div_rn(e, total)


@triton.jit
def _output(x, top, total, reciprocal, LOG: tl.constexpr, NEAR: tl.constexpr):
    """softmax from the total, or log_softmax from its logarithm."""
    if LOG:
        return (x.to(tl.float32) - top) - total
    else:  # noqa: RET505
        return _divided(_exponential(x, top, NEAR), total, reciprocal, NEAR)


@triton.jit
def _softmax_row(
    tiles,
    x,
    out,
    columns,
    n,
    top,
    LOG: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    FULL: tl.constexpr,
    NEAR: tl.constexpr,
):
    if T > 0 and not LOG:
        each = ()
        for t in tl.static_range(T * P):
            each = each + (_exponential(tiles[t], top, NEAR),)  # noqa: RUF005
        total = fold(held_lanes(each, columns, n, top, P, T, FULL, 0), 0)
        reciprocal = tl.div_rn(1.0, total)
        for t in tl.static_range(T * P):
            y = _divided(each[t], total, reciprocal, NEAR)
            store_tile(out, columns, n, y, t, T * P, FULL, NEAR, P)
    else:
        kind: tl.constexpr = NEAR_EXPONENTIAL if NEAR else EXPONENTIAL
        total = row_total(tiles, x, columns, n, top, P, T, FULL, kind)
        reciprocal = tl.div_rn(1.0, total)
        if LOG:
            total = log(total)
        for t in tl.static_range(T * P):
            y = _output(tiles[t], top, total, reciprocal, LOG, NEAR)
            store_tile(out, columns, n, y, t, T * P, FULL, NEAR, P)
        if T == 0:
            whole = n // _SEGMENT * _SEGMENT
            for begin in tl.range(0, whole, _SEGMENT):
                for t in tl.static_range(_DEPTH):
                    v = tl.load(x + begin + t * _LANES + columns)
                    y = _output(v, top, total, reciprocal, LOG, NEAR)
                    store_tile(out + begin, columns, n, y, t, _DEPTH, True, NEAR)
            for begin in tl.range(whole, n, _LANES):
                v = load_tile(x + begin, columns, n - begin, 0, 1, False, float("-inf"))
                y = _output(v, top, total, reciprocal, LOG, NEAR)
                store_tile(out + begin, columns, n - begin, y, 0, 1, False, NEAR)


@triton.jit(do_not_specialize=["n_units"])
def _softmax_kernel(
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
    n = n_units * UNIT
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, L)
    from_, to = x + row * n, out + row * n
    tiles = load_row(from_, columns, n, P, T, FULL, float("-inf"))
    top, bottom = row_range(tiles, from_, columns, n, P, T, FULL)
    if is_near(top, bottom):
        _softmax_row(tiles, from_, to, columns, n, top, LOG, P, T, FULL, True)
    else:
        _softmax_row(tiles, from_, to, columns, n, top, LOG, P, T, FULL, False)


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
    if near_of_row:
        y = _output(v, best, whole, tl.div_rn(1.0, whole), LOG, True)
    else:
        y = _output(v, best, whole, 1.0, LOG, False)
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
    n = n_units * UNIT
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, L)
    from_g, from_y, to = g + row * n, y + row * n, out + row * n
    zero = 0.0
    gs = load_row(from_g, columns, n, P, T, FULL, 0.0)
    ys = load_row(from_y, columns, n, P, T, FULL, 0.0)
    if LOG:
        total = row_total(gs, from_g, columns, n, zero, P, T, FULL, 0)
    elif T > 0:
        products = ()
        for t in tl.static_range(T * P):
            v = gs[t].to(tl.float32) * ys[t].to(tl.float32)
            products = products + (v,)  # noqa: RUF005
        lanes = held_lanes(products, columns, n, zero, P, T, FULL, 0)
        total = fold(lanes, 0)
    else:
        lanes = tl.zeros((_LANES,), tl.float32)
        for begin in tl.range(0, n, _SEGMENT):
            part = tl.zeros((_LANES,), tl.float32)
            for t in tl.static_range(_DEPTH):
                vg = load_tile(from_g + begin, columns, n - begin, t, 0, False, 0.0)
                vy = load_tile(from_y + begin, columns, n - begin, t, 0, False, 0.0)
                part += vg.to(tl.float32) * vy.to(tl.float32)
            lanes += part
        total = fold(lanes, 0)
    for t in tl.static_range(T * P):
        store_tile(to, columns, n, _gradient(gs[t], ys[t], total, LOG), t, T * P, FULL, False, P)
    if T == 0:
        for begin in tl.range(0, n, _LANES):
            vg = load_tile(from_g + begin, columns, n - begin, 0, 1, False, 0.0)
            vy = load_tile(from_y + begin, columns, n - begin, 0, 1, False, 0.0)
            v = _gradient(vg, vy, total, LOG)
            store_tile(to + begin, columns, n - begin, v, 0, 1, False, False)


@triton.jit
def _gradient(g, y, total, LOG: tl.constexpr):
    g = g.to(tl.float32)
    y = y.to(tl.float32)
    if LOG:
        return g - exp(y, False) * total
    else:  # noqa: RET505
        return (g - total) * y


_softmax = RowKernel(_softmax_kernel)
_segment = RowKernel(_segment_kernel)
_backward = RowKernel(_backward_kernel)


def _split_rows(log: bool, x: torch.Tensor, out: torch.Tensor, shape: Plan) -> None:
    rows, n = x.shape
    top = segments.tops(x, shape)
    lanes = segments.lanes(x, top, segments.TOP_SHIFT.value, TERM_OF[EXP_SUM.value], shape)
    op = LOG_EXP_SUM.value if log else EXP_SUM.value
    total = finish(lanes, None, op, float(n), 0.0, torch.float32)
    count, tops = segments.segments_of(n), top.size(2)
    _segment(
        rows * count,
        (x, top, total, out),
        (n // shape.unit, count, tops),
        (log, triton.next_power_of_2(tops), shape.unit),
        8,
    )


def softmax_rows(log: bool, x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """softmax or log_softmax of the rows of contiguous x [rows, n] in fp32, bf16 or fp16."""
    rows, n = x.shape
    out = torch.empty(rows, n, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    shape = plan_of(x)
    if shape.split:
        _split_rows(log, x, out, shape)
        return out
    _softmax(
        rows,
        (x, out),
        (n // shape.unit,),
        (log, shape.width, shape.parts, shape.tiles, shape.full, shape.unit),
        shape.warps,
    )
    return out


def _backward_rows(
    log: bool, g: torch.Tensor, y: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    rows, n = g.shape
    out = torch.empty(rows, n, dtype=out_dtype, device=g.device)
    if not out.numel():
        return out
    shape = plan_of(g)
    _backward(
        rows,
        (g, y, out),
        (n // shape.unit,),
        (log, shape.width, shape.parts, shape.tiles, shape.full, shape.unit),
        shape.warps,
    )
    return out


def _forward(log: bool) -> Callable[..., torch.Tensor]:
    def softmax(self: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
        normalize(dim, self.dim())
        x = cast(self, dtype)
        if not x.dtype.is_floating_point:
            raise OpNotSupported(f"softmax: expected a floating point tensor, got {x.dtype}")
        matrix = rows_along(x, dim)
        if matrix.dtype == torch.float64:
            out = _float64(log, matrix)
        else:
            out = softmax_rows(log, matrix, dtype or x.dtype)
        return from_rows_along(out, x.shape, dim)

    return softmax


def _float64(log: bool, x: torch.Tensor) -> torch.Tensor:
    if x.numel() == 0:
        return x
    shifted = x - stock("amax", "CUDA")(x, [1], True)
    e = shifted.exp()
    total = lane_sum(e)[:, None]
    return shifted - total.log() if log else e / total


def _derivative(log: bool) -> Callable[..., torch.Tensor]:
    def softmax_backward(
        grad_output: torch.Tensor, output: torch.Tensor, dim: int, input_dtype: torch.dtype
    ) -> torch.Tensor:
        g, y = rows_along(grad_output, dim), rows_along(output, dim)
        if g.dtype == torch.float64:
            total = lane_sum(g if log else g * y)[:, None]
            out = g - y.exp() * total if log else (g - total) * y
        elif input_dtype in (g.dtype, torch.float32):
            out = _backward_rows(log, g, y, input_dtype)
        else:
            out = _backward_rows(log, g, y, g.dtype).to(input_dtype)
        return from_rows_along(out, grad_output.shape, dim)

    return softmax_backward


def _kernel(fn: Callable[..., Any]) -> Kernel:
    return Kernel(
        fn=fn,
        guarantee=Guarantee.BATCH,
        dtypes=frozenset((*FLOATS, torch.float64)),
        order=ROW_ORDER,
        portable=frozenset(FLOATS),
    )


KERNELS = {
    "softmax": _kernel(_forward(False)),
    "log_softmax": _kernel(_forward(True)),
    "softmax_backward": _kernel(_derivative(False)),
    "log_softmax_backward": _kernel(_derivative(True)),
}
