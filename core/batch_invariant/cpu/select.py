"""argmax and topk on CPU: native for fp32, bf16 and fp16; a stable sort for every other dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.cpu import rows
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
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


def _argmax(self: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    dims = normalize(dim, self.dim())
    x = rows_of(self, dims)
    if x.size(1) == 0:
        raise IndexError(
            f"argmax: expected a reduction dim with at least one element, got {list(self.shape)}"
        )
    out = rows.argmax(x) if x.dtype in FLOATS else stock("argmax")(x, 1, False)
    shaped: torch.Tensor = out.view(reduced_shape(self.shape, dims, keepdim))
    return shaped


def _topk(
    self: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    topk_shape(self, k, dim)
    x = rows_along(self, dim)
    if x.dtype in FLOATS:
        values, indices = rows.topk(x, k, largest)
    else:
        values, indices = stock("sort.stable")(x, stable=True, dim=1, descending=largest)
        values, indices = values[:, :k].contiguous(), indices[:, :k].contiguous()
    return from_rows_along(values, self.shape, dim), from_rows_along(indices, self.shape, dim)


def _kernel(fn: Callable[..., Any]) -> Kernel:
    return Kernel(
        fn=fn,
        guarantee=Guarantee.SCHEDULE,
        dtypes=frozenset((*FLOATS, torch.float64)),
        order=undeclared("exact selection, lowest index first"),
        portable=frozenset((*FLOATS, torch.float64)),
    )


KERNELS = {"argmax": _kernel(_argmax), "topk": _kernel(_topk)}
