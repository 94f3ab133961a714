"""embedding on CUDA: rows of the table are copied, so torch's kernel is exact."""

from __future__ import annotations

import torch

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.order import undeclared
from batch_invariant.stock import stock


def _embedding(weight: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = stock("embedding", "CUDA")(weight, indices, -1, False, False)
    return out


KERNELS = {
    "embedding": Kernel(
        fn=_embedding,
        guarantee=Guarantee.SCHEDULE,
        dtypes=frozenset((*FLOATS, torch.float64, torch.complex64, torch.complex128)),
        order=undeclared("copies"),
        portable=frozenset((*FLOATS, torch.float64)),
    )
}
