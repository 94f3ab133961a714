"""sum, mean, prod, var, std, norm and logsumexp on Ascend: `row_sum` and elementwise operators.

Full torch semantics: dim None, an int or a list, keepdim, dtype, integers, 0-d and empty tensors.
Dimensions that are reduced are moved to the end, which no vendor's kernel has to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.dims import normalize, reduced_shape, rows_of
from batch_invariant.ops.reduce import check_floating
from batch_invariant.ops.row_order import ROW_ORDER, lane_prod
from batch_invariant.stock import stock
from batch_invariant_ascend import row_sum as sums
from batch_invariant_ascend.dtypes import DTYPES, accumulated, check_dtype
from batch_invariant_ascend.explog import exp, log
from batch_invariant_ascend.row_sum import row_sum
from batch_invariant_ascend.tiers import Tier

_KEY = "PrivateUse1"


def _exact(x: torch.Tensor, dtype: torch.dtype | None) -> bool:
    """Whether the result is made of integers, which every order adds alike."""
    wanted = dtype or x.dtype
    return not wanted.is_floating_point and not wanted.is_complex


def _sum(self: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dims = normalize(dim, self.dim())
    if _exact(self, dtype):
        return stock("sum.dim_IntList", _KEY)(self, dim, keepdim, dtype=dtype)
    out = row_sum(rows_of(accumulated("sum", self, dtype), dims))
    return out.to(dtype or self.dtype).view(reduced_shape(self.shape, dims, keepdim))


def _mean(self: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if _exact(self, dtype):
        raise RuntimeError(
            f"mean: the input dtype is {self.dtype}; expected a floating point dtype, "
            "in the tensor or in the dtype argument"
        )
    dims = normalize(dim, self.dim())
    rows = rows_of(accumulated("mean", self, dtype), dims)
    out = divided(row_sum(rows), rows.size(1))
    return out.to(dtype or self.dtype).view(reduced_shape(self.shape, dims, keepdim))


def divided(x: torch.Tensor, n: float) -> torch.Tensor:
    """x / n by tensors: division by a number may be a multiplication by its reciprocal."""
    return x / torch.full((), n, dtype=x.dtype, device=x.device)


def _prod(self: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if _exact(self, dtype):
        if dim is None:
            return stock("prod", _KEY)(self, dtype=dtype)
        return stock("prod.dim_int", _KEY)(self, dim, keepdim, dtype=dtype)
    dims = normalize(dim, self.dim())
    out = lane_prod(rows_of(accumulated("prod", self, dtype), dims))
    return out.to(dtype or self.dtype).view(reduced_shape(self.shape, dims, keepdim))


def _spread(name: str) -> Callable[..., torch.Tensor]:
    def spread(
        self: torch.Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False
    ) -> torch.Tensor:
        check_floating(name, self)
        dims = normalize(dim, self.dim())
        rows = rows_of(accumulated(name, self, None), dims)
        n = rows.size(1)
        centred = rows - divided(row_sum(rows), n)[:, None]
        degrees = max(0.0, n - (1 if correction is None else correction))
        out = divided(row_sum(centred * centred), degrees)
        out = stock("sqrt", _KEY)(out) if name == "std" else out
        return out.to(self.dtype).view(reduced_shape(self.shape, dims, keepdim))

    return spread


def _norm(
    self: torch.Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> torch.Tensor:
    check_floating("norm", self)
    dims = normalize(dim, self.dim())
    x = rows_of(accumulated("norm", self, dtype), dims)
    if x.size(1) == 0 and (ord < 0 or ord == math.inf):
        raise RuntimeError(f"norm: order {ord} has no value for an empty dimension")
    out = _power_norm(x, float(ord)).to(dtype or self.dtype)
    return out.view(reduced_shape(self.shape, dims, keepdim))


def _power_norm(x: torch.Tensor, p: float) -> torch.Tensor:
    if p == 0:
        return row_sum((x != 0).float())
    magnitude = x.abs()
    if abs(p) == math.inf:
        return magnitude.amax(1) if p > 0 else magnitude.amin(1)
    if p == 1:
        return row_sum(magnitude)
    if p == 2:
        root: torch.Tensor = stock("sqrt", _KEY)(row_sum(magnitude * magnitude))
        return root
    # |x|^p = exp(p log|x|), composed: the vendor's pow may depend on the place.
    return exp(log(row_sum(exp(log(magnitude) * p))) * (1 / p))


def _logsumexp(self: torch.Tensor, dim: Any, keepdim: bool = False) -> torch.Tensor:
    x = self if self.is_floating_point() or self.is_complex() else self.float()
    check_dtype("logsumexp", x)
    dims = normalize(dim, x.dim())
    rows = rows_of(x.float(), dims)
    top = rows.amax(1) if rows.size(1) else rows.new_full((len(rows),), -math.inf)
    top = top.masked_fill(top.isinf(), 0.0)
    out = log(row_sum(exp(rows - top[:, None]))) + top
    return out.to(x.dtype).view(reduced_shape(x.shape, dims, keepdim))


def kernels() -> dict[str, Kernel]:
    """By operator name."""
    chosen = sums.choice()
    ours = chosen.tier in (Tier.C, Tier.D)
    level = Guarantee.SCHEDULE if ours else Guarantee.BATCH

    def kernel(fn: Callable[..., Any]) -> Kernel:
        return Kernel(fn=fn, guarantee=level, dtypes=DTYPES, order=sums.order(), **chosen.shown)

    return {
        "sum": kernel(_sum),
        "mean": kernel(_mean),
        "prod": Kernel(
            fn=_prod,
            guarantee=Guarantee.SCHEDULE,
            dtypes=DTYPES,
            order=ROW_ORDER,
            source=Tier.D.value,
        ),
        "var": kernel(_spread("var")),
        "std": kernel(_spread("std")),
        "norm": kernel(_norm),
        "logsumexp": kernel(_logsumexp),
    }
