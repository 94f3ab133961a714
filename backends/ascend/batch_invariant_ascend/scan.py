"""cumsum on Ascend, by tier: CANN's, or every row one serial fp32 chain.

The chain is one column of all rows at a time, so it takes a launch for each: slow for long rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.dims import from_rows_along, normalize, rows_along
from batch_invariant.order import serial, undeclared
from batch_invariant.stock import stock
from batch_invariant_ascend import admission
from batch_invariant_ascend.dtypes import DTYPES, accumulated
from batch_invariant_ascend.switches import check_level_3
from batch_invariant_ascend.tiers import Candidate, Choice, Tier, choose, need_level_3

_KEY = "PrivateUse1"


def _cumsum(self: torch.Tensor, dim: int, *, dtype: Any = None) -> torch.Tensor:
    result = dtype or self.dtype
    normalize(dim, self.dim())
    if not result.is_floating_point and not result.is_complex:
        exact: torch.Tensor = stock("cumsum", _KEY)(self, dim, dtype=dtype)
        return exact
    x = rows_along(accumulated("cumsum", self, dtype), dim)
    out = choice().fn(x) if x.numel() else x
    return from_rows_along(out.to(result), self.shape, dim)


@cache
def choice() -> Choice:
    """The tier of running sums [rows, n] in fp32."""
    return choose(
        "running sums",
        (Candidate(Tier.A, _native, _varies), Candidate(Tier.D, lambda: _chain)),
    )


def _native() -> Callable[[torch.Tensor], torch.Tensor]:
    need_level_3()
    add = stock("cumsum", _KEY)

    def native(x: torch.Tensor) -> torch.Tensor:
        check_level_3()
        out: torch.Tensor = add(x, 1)
        return out

    return native


def _chain(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    total = x.new_zeros(len(x))
    for i in range(x.size(1)):
        total = total + x[:, i]
        out[:, i] = total
    return out


def _varies(fn: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    for n in (1100, 4099, 20011):
        x = admission.values(admission.ROWS, n, dtype=torch.float32).npu()
        if (found := admission.rows_agree(fn, x)) is not None:
            return f"running sums of {n}: {found}"
    return None


def kernels() -> dict[str, Kernel]:
    """By operator name."""
    chosen = choice()
    by_cann = chosen.tier is Tier.A
    return {
        "cumsum": Kernel(
            fn=_cumsum,
            guarantee=Guarantee.BATCH,
            dtypes=DTYPES,
            order=undeclared("CANN's own, batch consistent") if by_cann else serial(),
            **chosen.shown,
        )
    }
