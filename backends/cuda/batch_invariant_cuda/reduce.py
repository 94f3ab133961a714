"""Reductions on CUDA: sum, mean, prod, var, std, norm and logsumexp in the order of `rows.py`.

fp32, bf16 and fp16 run Triton kernels with the bits of the CPU reference; float64 runs the same
order in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from batch_invariant.backend import Kernel
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.dims import columns_of, normalize, reduced_shape, rows_of
from batch_invariant.ops.reduce import check_floating, result_dtype
from batch_invariant.ops.row_order import ROW_ORDER, lane_prod, lane_sum
from batch_invariant.stock import stock
from batch_invariant_cuda import segments
from batch_invariant_cuda.columns import reduce_columns
from batch_invariant_cuda.reduce_ops import (
    LOGSUMEXP,
    MEAN,
    MEAN_SQUARE,
    NORM0,
    NORM1,
    NORM2,
    PROD,
    STD,
    SUM,
    TERM_OF,
    VAR,
    finished,
    first_term,
    last_term,
    needs_mean,
)
from batch_invariant_cuda.row_launch import (
    LONG_WARPS,
    Calls,
    Plan,
    RowKernel,
    is_long,
    plan_of,
)
from batch_invariant_cuda.rows import (
    FEW,
    FEW_SEGMENTS,
    LANES,
    combine,
    fold,
    held_range,
    load_row,
    rounded,
    row_total,
    take_turn,
    walked_range,
)

_LANES = tl.constexpr(LANES)
_SINGLE_PASS = {op.value for op in (SUM, MEAN, PROD, NORM0, NORM1, NORM2, MEAN_SQUARE)}


@triton.jit(do_not_specialize=["n_units", "size", "divisor"])
def _reduce_kernel(
    x,
    out,
    n_units,
    size,
    divisor,
    OP: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    FULL: tl.constexpr,
    UNIT: tl.constexpr,
    LONG: tl.constexpr,
):
    take_turn()
    n = n_units * UNIT
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, L)
    from_ = x + row * n
    top = 0.0
    if OP == LOGSUMEXP:
        tiles = load_row(from_, columns, n, P, T, FULL, float("-inf"))
        if T > 0:
            top, _ = held_range(tiles, columns, n, P, T, FULL)
        else:
            top, _ = walked_range(from_, n)
        top = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    else:
        tiles = load_row(from_, columns, n, P, T, FULL, 0.0)
    shift = top
    if needs_mean(OP):
        mean = row_total(tiles, from_, columns, n, shift, P, T, FULL, UNIT, first_term(OP))
        shift = tl.div_rn(mean, size)
    term: tl.constexpr = last_term(OP)
    total = row_total(tiles, from_, columns, n, shift, P, T, FULL, UNIT, term, LONG)
    y = finished(total, top, size, divisor, OP)
    tl.store(out + row, rounded(y, out.dtype.element_ty))


@triton.jit(do_not_specialize=["parts", "tops", "size", "divisor"])
def _finish_kernel(
    lanes,
    top,
    out,
    parts,
    tops,
    size,
    divisor,
    OP: tl.constexpr,
    TOPS: tl.constexpr,
):
    take_turn(FEW_SEGMENTS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, _LANES)
    from_ = lanes + row * parts * _LANES + columns
    v = tl.load(from_)
    for part in tl.range(1, parts, loop_unroll_factor=4):
        v = combine(v, tl.load(from_ + part * _LANES), last_term(OP))
    total = fold(v, last_term(OP))
    best = 0.0
    if TOPS > 0:
        best = segments.top_of(top, row, tops, TOPS, True)
    y = finished(total, best, size, divisor, OP)
    tl.store(out + row, rounded(y, out.dtype.element_ty))


_reduce = RowKernel(_reduce_kernel, overlaps=FEW.value)
_long_reduce = RowKernel(_reduce_kernel, overlaps=FEW.value, registers={LONG_WARPS: 64})
_finish = RowKernel(_finish_kernel, overlaps=FEW_SEGMENTS.value)


def finish(
    lanes: torch.Tensor,
    top: torch.Tensor | None,
    op: int,
    size: float,
    divisor: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The results [rows] of a reduction from lanes [rows, m, 1024], added over m in order."""
    rows, parts, _ = lanes.shape
    out = torch.empty(rows, dtype=out_dtype, device=lanes.device)
    tops = 0 if top is None else top.size(2)
    width = triton.next_power_of_2(tops) if tops else 0
    _finish(
        rows,
        (lanes, top if top is not None else lanes, out),
        (parts, tops, size, divisor),
        (op, width),
        8,
    )
    return out


def _split_rows(
    op: int, x: torch.Tensor, out_dtype: torch.dtype, divisor: float, shape: Plan
) -> torch.Tensor:
    size = float(x.size(1))
    shift = top = None
    kind = segments.NO_SHIFT.value
    if op == LOGSUMEXP:
        shift = top = segments.tops(x, shape)
        kind = segments.FINITE_TOP_SHIFT.value
    elif op in (VAR, STD):
        sums = segments.lanes(x, None, kind, TERM_OF[SUM.value], shape)
        shift = finish(sums, None, MEAN.value, size, 0.0, torch.float32)
        kind = segments.ROW_SHIFT.value
    lanes = segments.lanes(x, shift, kind, TERM_OF[op], shape)
    return finish(lanes, top, op, size, divisor, out_dtype)


def reduce_rows(
    op: int, x: torch.Tensor, out_dtype: torch.dtype, divisor: float = 0.0
) -> torch.Tensor:
    """One of `reduce_ops` over the rows of contiguous x [rows, n]; returns [rows].

    The total is fp32 in the order of `rows.py`, and is rounded to `out_dtype` once. `divisor` is
    what VAR and STD divide by.
    """
    rows, n = x.shape
    if n == 0:
        empty = torch.zeros(rows, 1, dtype=x.dtype, device=x.device)
        if op in (SUM, NORM0, NORM1, NORM2):
            return empty[:, 0].to(out_dtype)
        if op == PROD:
            return empty[:, 0].to(out_dtype) + 1
        values = {LOGSUMEXP.value: -math.inf}
        return torch.full((rows,), values.get(op, math.nan), dtype=out_dtype, device=x.device)
    shape = plan_of(x, single_pass=op in _SINGLE_PASS)
    if shape.split:
        return _split_rows(op, x, out_dtype, divisor, shape)
    out = torch.empty(rows, dtype=out_dtype, device=x.device)
    kernel, launch = _launch(op, x, out, divisor, shape)
    kernel(*launch)
    return out


def _launch(op: int, x: torch.Tensor, out: torch.Tensor, divisor: float, shape: Plan) -> Any:
    rows, n = x.shape
    long = is_long(n, shape) and op in _SINGLE_PASS
    static = (op, shape.width, shape.parts, shape.tiles, shape.full, shape.unit, long)
    warps = LONG_WARPS if long else shape.warps
    numbers = (n // shape.unit, float(n), divisor)
    kernel = _long_reduce if long else _reduce
    return kernel, (rows, (x, out), numbers, static, warps, shape.wide)


def cast(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The input as it is accumulated: low precision widens on its own, so it is left alone."""
    if x.dtype.is_complex or (dtype is not None and dtype.is_complex):
        raise OpNotSupported(f"complex numbers have no batch-invariant kernel on CUDA: {x.dtype}")
    if dtype is None or dtype == x.dtype or (dtype == torch.float32 and x.dtype in FLOATS):
        return x
    wide = x.to(dtype)
    if wide.dtype not in (*FLOATS, torch.float64):
        raise OpNotSupported(
            f"the CUDA kernels take float32, bfloat16, float16 and float64; got {wide.dtype}"
        )
    return wide


def _exact(x: torch.Tensor, dtype: torch.dtype | None) -> bool:
    """Whether the result is made of integers, which every order adds alike."""
    return not (dtype or x.dtype).is_floating_point and not (dtype or x.dtype).is_complex


def _reduce_dims(
    op: int, x: torch.Tensor, dims: tuple[int, ...], out_dtype: torch.dtype, divisor: float = 0.0
) -> torch.Tensor:
    """Reduces fp32, bf16 or fp16 over `dims`: down columns where that saves a copy, else rows."""
    if len(dims) == 1 and op != LOGSUMEXP:
        columns = columns_of(x, dims[0])
        if columns is not None and columns.size(1):
            return reduce_columns(op, columns, out_dtype, divisor)
    return reduce_rows(op, rows_of(x, dims), out_dtype, divisor)


_calls = Calls()


def _repeated(op: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A sum or mean that keeps what its calls need."""

    def decorate(first: Callable[..., Any]) -> Callable[..., Any]:
        def reduction(
            self: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
        ) -> Any:
            key = (
                *(op, self.shape, self.stride(), self.dtype, self.get_device()),
                *(self.data_ptr() & 15, tuple(dim) if type(dim) is list else dim, keepdim, dtype),
            )
            call = _calls.find(key)
            if call is not None:
                return call(self)
            out = first(self, dim, keepdim, dtype=dtype)
            call = _repeat(op, self, dim, dtype, out)
            if call is not None:
                _calls.keep(key, call)
            return out

        return reduction

    return decorate


def _repeat(
    op: int, x: torch.Tensor, dim: Any, dtype: Any, out: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The same call again as a launch and nothing else, where it is one launch on x as it lies."""
    if not x.is_cuda or x.dtype not in FLOATS or not x.numel() or not x.is_contiguous():
        return None
    if normalize(dim, x.dim()) != (x.dim() - 1,) or cast(x, dtype) is not x:
        return None
    matrix = x.view(-1, x.size(-1))
    shape = plan_of(matrix, single_pass=True)
    if shape.split:
        return None
    kernel, launch = _launch(op, matrix, out, 0.0, shape)
    start = kernel.repeat(*launch)
    if start is None:
        return None
    size, result = out.shape, out.dtype

    def again(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(size, dtype=result)
        start(x.data_ptr(), out.data_ptr())
        return out

    return again


@_repeated(SUM.value)
def _sum(self: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if _exact(self, dtype):
        return stock("sum.dim_IntList", "CUDA")(self, dim, keepdim, dtype=dtype)
    dims = normalize(dim, self.dim())
    x = cast(self, dtype)
    if x.dtype == torch.float64:
        out = lane_sum(rows_of(x, dims))
    else:
        out = _reduce_dims(SUM.value, x, dims, dtype or x.dtype)
    return out.view(reduced_shape(self.shape, dims, keepdim))


@_repeated(MEAN.value)
def _mean(self: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if _exact(self, dtype):
        raise RuntimeError(
            f"mean: the input dtype is {self.dtype}; expected a floating point dtype, "
            "in the tensor or in the dtype argument"
        )
    dims = normalize(dim, self.dim())
    x = cast(self, dtype)
    if x.dtype == torch.float64:
        matrix = rows_of(x, dims)
        out = lane_sum(matrix) / matrix.size(1)
    else:
        out = _reduce_dims(MEAN.value, x, dims, dtype or x.dtype)
    return out.view(reduced_shape(self.shape, dims, keepdim))


@_repeated(MEAN_SQUARE.value)
def mean_square(
    self: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    """The mean of the squares of fp32, bf16 or fp16, widened and rounded to fp32: `_mean` of them.

    The result is fp32; `dtype` is there for `_repeated` and ignored.
    """
    dims = normalize(dim, self.dim())
    out = _reduce_dims(MEAN_SQUARE.value, self, dims, torch.float32)
    return out.view(reduced_shape(self.shape, dims, keepdim))


def _prod(self: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if _exact(self, dtype):
        if dim is None:
            return stock("prod", "CUDA")(self, dtype=dtype)
        return stock("prod.dim_int", "CUDA")(self, dim, keepdim, dtype=dtype)
    dims = normalize(dim, self.dim())
    x = cast(self, dtype)
    if x.dtype == torch.float64:
        out = lane_prod(rows_of(x, dims))
    else:
        out = _reduce_dims(PROD.value, x, dims, result_dtype(x, dtype))
    return out.view(reduced_shape(self.shape, dims, keepdim))


def _spread(root: bool) -> Callable[..., torch.Tensor]:
    def spread(
        self: torch.Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False
    ) -> torch.Tensor:
        check_floating("std" if root else "var", self)
        dims = normalize(dim, self.dim())
        x = cast(self, None)
        n = math.prod(x.size(d) for d in dims)
        degrees = max(0.0, n - float(1 if correction is None else correction))
        if x.dtype == torch.float64:
            matrix = rows_of(x, dims)
            centred = matrix - (lane_sum(matrix) / n if n else lane_sum(matrix))[:, None]
            out = lane_sum(centred * centred) / degrees
            out = out.sqrt() if root else out
        else:
            out = _reduce_dims((STD if root else VAR).value, x, dims, x.dtype, degrees)
        return out.view(reduced_shape(self.shape, dims, keepdim))

    return spread


_NORM = {0.0: NORM0.value, 1.0: NORM1.value, 2.0: NORM2.value}


def _norm(
    self: torch.Tensor,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> torch.Tensor:
    check_floating("norm", self)
    dims = normalize(dim, self.dim())
    p = float(ord)
    x = cast(self, dtype)
    if (p < 0 or p == math.inf) and not math.prod(x.size(d) for d in dims):
        raise RuntimeError(f"norm: order {ord} has no value for an empty dimension")
    result = dtype or x.dtype
    if x.dtype != torch.float64 and p in _NORM:
        out = _reduce_dims(_NORM[p], x, dims, result)
    else:
        out = _other_norm(rows_of(x, dims), p).to(result)
        out = out.masked_fill(out.isnan(), math.nan)
    return out.view(reduced_shape(self.shape, dims, keepdim))


def _other_norm(x: torch.Tensor, p: float) -> torch.Tensor:
    """The norms that are maxima, and those by powers: elementwise functions and a lane sum."""
    wide = x if x.dtype == torch.float64 else x.float()
    magnitude = wide.abs()
    if abs(p) == math.inf:
        extreme: torch.Tensor = stock("amax" if p > 0 else "amin", "CUDA")(magnitude, [1], False)
        return extreme

    def total(terms: torch.Tensor) -> torch.Tensor:
        return (
            lane_sum(terms)
            if terms.dtype == torch.float64
            else reduce_rows(SUM.value, terms, torch.float32)
        )

    if p == 0:
        return total((wide != 0).to(wide.dtype))
    if p == 1:
        return total(magnitude)
    if p == 2:
        return total(magnitude * magnitude).sqrt()
    power = torch.ops.batch_invariant.pow.default
    out: torch.Tensor = power(total(power(magnitude, p)), 1 / p)
    return out


def _logsumexp(self: torch.Tensor, dim: Any, keepdim: bool = False) -> torch.Tensor:
    if self.is_complex():
        raise OpNotSupported("logsumexp on CUDA takes real numbers; split real and imaginary parts")
    x = self if self.dtype.is_floating_point else self.to(torch.get_default_dtype())
    dims = normalize(dim, x.dim())
    matrix = rows_of(cast(x, None), dims)
    if matrix.dtype != torch.float64:
        out = reduce_rows(LOGSUMEXP.value, matrix, matrix.dtype)
    else:
        top = matrix.new_full((len(matrix),), -math.inf)
        if matrix.size(1):
            top = stock("amax", "CUDA")(matrix, [1], False)
        top = torch.where(top.isinf(), 0, top)
        out = lane_sum((matrix - top[:, None]).exp()).log() + top
    return out.view(reduced_shape(x.shape, dims, keepdim))


def _kernel(fn: Callable[..., Any]) -> Kernel:
    return Kernel(
        fn=fn,
        guarantee=Guarantee.SCHEDULE,
        dtypes=frozenset((*FLOATS, torch.float64)),
        order=ROW_ORDER,
        portable=frozenset(FLOATS),
    )


KERNELS = {
    "sum": _kernel(_sum),
    "mean": _kernel(_mean),
    "prod": _kernel(_prod),
    "var": _kernel(_spread(root=False)),
    "std": _kernel(_spread(root=True)),
    "norm": _kernel(_norm),
    "logsumexp": _kernel(_logsumexp),
}
