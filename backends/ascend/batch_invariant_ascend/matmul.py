"""mm, addmm, bmm, baddbmm and linear on Ascend: `product`; addends in fp32 before the rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.matmul import check_addend, check_bmm, check_linear, check_mm
from batch_invariant_ascend import product
from batch_invariant_ascend.dtypes import DTYPES, check_dtype
from batch_invariant_ascend.tiers import Tier


def _mm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    check_mm(self, mat2)
    check_dtype("mm", self, mat2)
    return product.product(self, mat2, self.dtype)


def _bmm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    check_bmm(self, mat2)
    check_dtype("bmm", self, mat2)
    return product.product(self, mat2, self.dtype)


def _addmm(
    self: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, *, beta: Any = 1, alpha: Any = 1
) -> torch.Tensor:
    check_mm(mat1, mat2, self)
    check_dtype("addmm", mat1, mat2, self)
    addend = check_addend("addmm", self, (mat1.size(0), mat2.size(1)))
    return _added(addend, mat1, mat2, beta, alpha)


def _baddbmm(
    self: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor, *, beta: Any = 1, alpha: Any = 1
) -> torch.Tensor:
    check_bmm(batch1, batch2, self)
    check_dtype("baddbmm", batch1, batch2, self)
    addend = check_addend("baddbmm", self, (*batch1.shape[:2], batch2.size(2)))
    return _added(addend, batch1, batch2, beta, alpha)


def _added(
    addend: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: Any, alpha: Any
) -> torch.Tensor:
    total = product.product(a, b, torch.float32)
    if alpha != 1:
        total = total * alpha
    if beta != 0:
        total = total + (addend.float() if beta == 1 else addend.float() * beta)
    return total.to(a.dtype)


def _linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    check_linear(input, weight, bias)
    check_dtype("linear", input, weight, bias)
    matrix = weight if weight.dim() == 2 else weight[None]
    rows = input.reshape(input.shape[:-1].numel(), input.size(-1))
    if bias is None:
        out = product.product(rows, matrix.mT, input.dtype)
    else:
        out = (product.product(rows, matrix.mT, torch.float32) + bias.float()).to(input.dtype)
    return out.view(*input.shape[:-1], *weight.shape[:-1])


def kernels() -> dict[str, Kernel]:
    """By operator name."""
    chosen = product.choice()
    # The vendor speaks of batches only; a chain over k of our own does not know any sequence.
    ours = chosen.tier in (Tier.C, Tier.D)

    def kernel(fn: Callable[..., torch.Tensor]) -> Kernel:
        return Kernel(
            fn=fn,
            guarantee=Guarantee.SCHEDULE if ours else Guarantee.BATCH,
            dtypes=DTYPES,
            order=product.order(),
            **chosen.shown,
        )

    return {
        "mm": kernel(_mm),
        "addmm": kernel(_addmm),
        "bmm": kernel(_bmm),
        "baddbmm": kernel(_baddbmm),
        "linear": kernel(_linear),
    }
