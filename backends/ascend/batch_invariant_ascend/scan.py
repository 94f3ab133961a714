"""cumsum on Ascend: every row one serial fp32 chain, one column of all rows at a time."""

from __future__ import annotations

from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.dims import from_rows_along, normalize, rows_along
from batch_invariant.order import serial
from batch_invariant.stock import stock
from batch_invariant_ascend.dtypes import DTYPES, accumulated
from batch_invariant_ascend.tiers import Tier


def _cumsum(self: torch.Tensor, dim: int, *, dtype: Any = None) -> torch.Tensor:
    result = dtype or self.dtype
    normalize(dim, self.dim())
    if not result.is_floating_point and not result.is_complex:
        exact: torch.Tensor = stock("cumsum", "PrivateUse1")(self, dim, dtype=dtype)
        return exact
    x = rows_along(accumulated("cumsum", self, dtype), dim)
    out = torch.empty_like(x)
    total = x.new_zeros(len(x))
    for i in range(x.size(1)):
        total = total + x[:, i]
        out[:, i] = total
    return from_rows_along(out.to(result), self.shape, dim)


def kernels() -> dict[str, Kernel]:
    """By operator name."""
    return {
        "cumsum": Kernel(
            fn=_cumsum,
            guarantee=Guarantee.BATCH,
            dtypes=DTYPES,
            order=serial(),
            source=Tier.D.value,
        )
    }
