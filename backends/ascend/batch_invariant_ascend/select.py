"""argmax and topk on Ascend: exact selections, the lowest index first among equals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.dims import (
    from_rows_along,
    normalize,
    reduced_shape,
    rows_along,
    rows_of,
)
from batch_invariant.ops.select import topk_shape
from batch_invariant.order import undeclared
from batch_invariant.stock import stock
from batch_invariant_ascend.dtypes import DTYPES, check_dtype
from batch_invariant_ascend.tiers import Tier


def _argmax(self: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    dims = normalize(dim, self.dim())
    if self.is_floating_point() or self.is_complex():
        check_dtype("argmax", self)
    x = rows_of(self, dims)
    n = x.size(1)
    if n == 0:
        raise IndexError(
            f"argmax: expected a reduction dim with at least one element, got {list(self.shape)}"
        )
    top = x.amax(1, keepdim=True)
    # NaN is the largest, and equals nothing.
    largest = (x == top) | ((x != x) & (top != top))
    places = torch.arange(n, dtype=torch.int32, device=x.device)
    first = torch.where(largest, places, places.new_full((), n)).amin(1)
    return first.to(torch.int64).view(reduced_shape(self.shape, dims, keepdim))


def _topk(
    self: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    topk_shape(self, k, dim)
    if self.is_floating_point() or self.is_complex():
        check_dtype("topk", self)
    x = rows_along(self, dim)
    values, indices = stock("sort.stable", "PrivateUse1")(x, stable=True, dim=1, descending=largest)
    values, indices = values[:, :k].contiguous(), indices[:, :k].contiguous()
    return from_rows_along(values, self.shape, dim), from_rows_along(indices, self.shape, dim)


def kernels() -> dict[str, Kernel]:
    """By operator name."""

    def kernel(fn: Callable[..., Any]) -> Kernel:
        return Kernel(
            fn=fn,
            guarantee=Guarantee.BATCH,
            dtypes=DTYPES,
            order=undeclared("exact selection, lowest index first"),
            source=Tier.D.value,
        )

    return {"argmax": kernel(_argmax), "topk": kernel(_topk)}
