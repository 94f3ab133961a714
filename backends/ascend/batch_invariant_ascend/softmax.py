"""softmax, log_softmax and their derivatives on Ascend.

D: exact maximum, composed exp, `row_sum`, one division or logarithm. C: the same in one kernel, for
softmax. A and B: the vendor's kernel over the last dimension, compared with itself on this device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.dims import from_rows_along, rows_along
from batch_invariant.ops.row_order import ROW_ORDER
from batch_invariant.ops.softmax import check_softmax, check_softmax_backward
from batch_invariant.order import Order, undeclared
from batch_invariant.stock import stock
from batch_invariant_ascend import admission
from batch_invariant_ascend import row_sum as sums
from batch_invariant_ascend.dtypes import DTYPES, check_dtype
from batch_invariant_ascend.explog import exp, log
from batch_invariant_ascend.row_sum import row_sum
from batch_invariant_ascend.switches import check_level_3
from batch_invariant_ascend.tiers import (
    Candidate,
    Choice,
    Missing,
    Tier,
    ascendc,
    choose,
    need_level_3,
    need_triton,
)

_ASCENDC = {
    "softmax": "npu_softmax_batch_invariant",
    "log_softmax": "npu_log_softmax_batch_invariant",
}


@cache
def choice(name: str) -> Choice:
    """The tier of softmax or log_softmax here."""
    return choose(
        name,
        (
            Candidate(Tier.A, lambda: _native(name), _varies),
            Candidate(Tier.B, lambda: _ascendc(name), _varies),
            Candidate(Tier.C, lambda: _triton(name), _varies),
            Candidate(sums.choice().tier, lambda: _composed(name)),
        ),
    )


def _native(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    need_level_3()
    fn = stock(f"_{name}", "PrivateUse1")

    def native(x: torch.Tensor) -> torch.Tensor:
        check_level_3()
        out: torch.Tensor = fn(x, 1, False)
        return out

    return native


def _ascendc(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    fn = ascendc(_ASCENDC[name])
    return lambda x: fn(x, 1)


def _triton(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if name != "softmax":
        raise Missing("has no log_softmax: it is composed on the tier of sums")
    need_triton()
    from batch_invariant_ascend.row_kernels import softmax

    return softmax


def _composed(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def rows(x: torch.Tensor) -> torch.Tensor:
        shifted = x - x.amax(1, keepdim=True)
        e = exp(shifted)
        total = row_sum(e)[:, None]
        return e / total if name == "softmax" else shifted - log(total)

    return rows


def _varies(fn: Callable[..., torch.Tensor]) -> str | None:
    for n in (1100, 4099):
        x = admission.values(admission.ROWS, n, dtype=torch.float32, cancelling=False).npu()
        if (found := admission.rows_agree(fn, x)) is not None:
            return f"rows of {n}: {found}"
    return None


def _forward(name: str) -> Callable[..., torch.Tensor]:
    def forward(self: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
        out_dtype = check_softmax(self, dim, dtype)
        x = self if dtype is None else self.to(dtype)
        check_dtype(name, x)
        if not x.numel():
            return torch.empty_like(x, memory_format=torch.contiguous_format)
        out = choice(name).fn(rows_along(x, dim).float())
        return from_rows_along(out.to(out_dtype), x.shape, dim)

    return forward


def _backward(name: str) -> Callable[..., torch.Tensor]:
    def backward(
        grad_output: torch.Tensor, output: torch.Tensor, dim: int, input_dtype: torch.dtype
    ) -> torch.Tensor:
        check_softmax_backward(grad_output, output, dim)
        check_dtype(name, grad_output)
        g, y = rows_along(grad_output, dim).float(), rows_along(output, dim).float()
        if name == "softmax_backward":
            out = (g - row_sum(g * y)[:, None]) * y
        else:
            out = g - exp(y) * row_sum(g)[:, None]
        return from_rows_along(out.to(input_dtype), grad_output.shape, dim)

    return backward


def _order(chosen: Choice) -> Order:
    if chosen.tier in (Tier.C, Tier.D):
        return ROW_ORDER
    # Composed on a vendor's sum, or the vendor's as a whole.
    return sums.order() if chosen.tier is sums.choice().tier else undeclared("the vendor's own")


def kernels() -> dict[str, Kernel]:
    """By operator name."""
    found = {}
    for name in _ASCENDC:
        chosen = choice(name)
        found[name] = Kernel(
            fn=_forward(name),
            guarantee=Guarantee.BATCH if chosen.tier in (Tier.A, Tier.B) else Guarantee.SCHEDULE,
            dtypes=DTYPES,
            order=_order(chosen),
            **chosen.shown,
        )
        found[f"{name}_backward"] = Kernel(
            fn=_backward(f"{name}_backward"),
            guarantee=Guarantee.BATCH,
            dtypes=DTYPES,
            order=sums.order(),
            **sums.choice().shown,
        )
    return found
