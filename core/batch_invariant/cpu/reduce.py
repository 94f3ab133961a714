"""Reductions on CPU: native lane sums for fp32, bf16, fp16; plain torch order for float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.cpu import rows
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.dims import columns_of, normalize, reduced_shape, rows_of
from batch_invariant.ops.reduce import check_floating, result_dtype
from batch_invariant.ops.row_order import ROW_ORDER, lane_prod, lane_sum
from batch_invariant.stock import stock


def _exact(x: torch.Tensor, dtype: torch.dtype | None) -> bool:
    """Whether the result is made of integers, which every order adds alike."""
    return not (dtype or x.dtype).is_floating_point and not (dtype or x.dtype).is_complex


def cast(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The input as it is accumulated: low precision widens on its own, so it is left alone."""
    if x.dtype.is_complex or (dtype is not None and dtype.is_complex):
        raise OpNotSupported(f"complex numbers have no batch-invariant kernel on CPU: {x.dtype}")
    if dtype is None or dtype == x.dtype or (dtype == torch.float32 and x.dtype in FLOATS):
        return x
    return x.to(dtype)


def _laid_out(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The input as `cpu/rows.py` takes it: columns where that saves a copy, else rows."""
    if len(dims) == 1 and x.dtype in FLOATS:
        columns = columns_of(x, dims[0])
        if columns is not None:
            return columns
    return rows_of(x, dims)


def _sum(self: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if _exact(self, dtype):
        return stock("sum.dim_IntList")(self, dim, keepdim, dtype=dtype)
    dims = normalize(dim, self.dim())
    x = _laid_out(cast(self, dtype), dims)
    out = lane_sum(x) if x.dtype == torch.float64 else rows.reduce(rows.SUM, x, dtype or x.dtype)
    return out.view(reduced_shape(self.shape, dims, keepdim))


def _mean(self: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if _exact(self, dtype):
        raise RuntimeError(
            f"mean: the input dtype is {self.dtype}; expected a floating point dtype, "
            "in the tensor or in the dtype argument"
        )
    dims = normalize(dim, self.dim())
    x = _laid_out(cast(self, dtype), dims)
    if x.dtype == torch.float64:
        out = lane_sum(x) / x.size(1)
    else:
        out = rows.reduce(rows.MEAN, x, dtype or x.dtype)
    return out.view(reduced_shape(self.shape, dims, keepdim))


def _prod(self: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if _exact(self, dtype):
        if dim is None:
            return stock("prod")(self, dtype=dtype)
        return stock("prod.dim_int")(self, dim, keepdim, dtype=dtype)
    dims = normalize(dim, self.dim())
    x = _laid_out(cast(self, dtype), dims)
    out_dtype = result_dtype(x, dtype)
    out = lane_prod(x) if x.dtype == torch.float64 else rows.reduce(rows.PROD, x, out_dtype)
    return out.view(reduced_shape(self.shape, dims, keepdim))


def _spread(root: bool) -> Callable[..., torch.Tensor]:
    def spread(
        self: torch.Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False
    ) -> torch.Tensor:
        check_floating("std" if root else "var", self)
        degrees = 1 if correction is None else correction
        dims = normalize(dim, self.dim())
        x = _laid_out(cast(self, None), dims)
        if x.dtype == torch.float64:
            n = x.size(1)
            centred = x - (lane_sum(x) / n)[:, None]
            out = lane_sum(centred * centred) / max(0.0, n - degrees)
            out = out.sqrt() if root else out
        else:
            out = rows.variance(x, degrees, root)
        return out.view(reduced_shape(self.shape, dims, keepdim))

    return spread


_NATIVE_NORM = {
    0.0: rows.NORM0,
    1.0: rows.NORM1,
    2.0: rows.NORM2,
    math.inf: rows.NORM_INF,
    -math.inf: rows.NORM_NEG_INF,
}


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
    is_native = float(ord) in _NATIVE_NORM
    x = cast(self, dtype)
    x = _laid_out(x, dims) if is_native else rows_of(x, dims)
    if x.size(1) == 0 and (ord < 0 or ord == math.inf):
        raise RuntimeError(f"norm: order {ord} has no value for an empty dimension")
    if x.dtype != torch.float64 and is_native:
        out = rows.reduce(_NATIVE_NORM[float(ord)], x, dtype or x.dtype)
    else:
        out = _power_norm(x, float(ord)).to(dtype or x.dtype)
    return out.view(reduced_shape(self.shape, dims, keepdim))


def _power_norm(x: torch.Tensor, p: float) -> torch.Tensor:
    """Norms by elementwise functions and a lane sum, in fp32 or float64."""
    wide = x if x.dtype == torch.float64 else x.float()
    if p == 0:
        return lane_sum((wide != 0).to(wide.dtype))
    magnitude = wide.abs()
    if abs(p) == math.inf:
        return magnitude.amax(1) if p > 0 else magnitude.amin(1)
    if p == 1:
        return lane_sum(magnitude)
    if p == 2:
        return lane_sum(magnitude * magnitude).sqrt()
    power = torch.ops.batch_invariant.pow.default
    out: torch.Tensor = power(lane_sum(power(magnitude, p)), 1 / p)
    return out


def _logsumexp(self: torch.Tensor, dim: Any, keepdim: bool = False) -> torch.Tensor:
    if self.is_complex():
        raise OpNotSupported("logsumexp on CPU takes real numbers; split real and imaginary parts")
    x = self if self.dtype.is_floating_point else self.to(torch.get_default_dtype())
    dims = normalize(dim, x.dim())
    matrix = rows_of(cast(x, None), dims)
    if matrix.dtype != torch.float64:
        out = rows.logsumexp(matrix)
    else:
        top = matrix.amax(1) if matrix.size(1) else matrix.new_full((len(matrix),), -math.inf)
        top = torch.where(top.isinf(), 0, top)
        exponentials = torch.ops.batch_invariant.exp.default(matrix - top[:, None])
        out = torch.ops.batch_invariant.log.default(lane_sum(exponentials)) + top
    return out.view(reduced_shape(x.shape, dims, keepdim))


_PORTABLE = frozenset(FLOATS)


def _kernel(fn: Callable[..., Any]) -> Kernel:
    return Kernel(
        fn=fn,
        guarantee=Guarantee.SCHEDULE,
        dtypes=frozenset((*FLOATS, torch.float64)),
        order=ROW_ORDER,
        portable=_PORTABLE,
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
