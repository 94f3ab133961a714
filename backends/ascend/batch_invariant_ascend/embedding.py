"""embedding on Ascend: rows of the table are copied."""

from __future__ import annotations

import torch

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.order import undeclared
from batch_invariant_ascend.dtypes import DTYPES, check_dtype
from batch_invariant_ascend.tiers import Tier


def _embedding(weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    check_dtype("embedding", weight)
    rows = weight.index_select(0, indices.reshape(-1))
    return rows.view(*indices.shape, weight.size(1))


def kernels() -> dict[str, Kernel]:
    """By operator name."""
    return {
        "embedding": Kernel(
            fn=_embedding,
            guarantee=Guarantee.BATCH,
            dtypes=DTYPES,
            order=undeclared("copies"),
            portable=DTYPES,
            source=Tier.D.value,
        )
    }
