"""grouped_mm on CPU: one native product after another, so each group has the bits of its mm."""

from __future__ import annotations

import torch

from batch_invariant.backend import Kernel
from batch_invariant.cpu.matmul import KERNELS as PRODUCTS
from batch_invariant.cpu.matmul import product
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.grouped import by_groups, check_grouped


def _grouped_mm(
    self: torch.Tensor, mat2: torch.Tensor, offs: torch.Tensor | None = None
) -> torch.Tensor:
    check_grouped(self, mat2, offs)
    out: torch.Tensor = (
        product(self, mat2) if offs is None else by_groups(product, self, mat2, offs)
    )
    return out


KERNELS = {
    "grouped_mm": Kernel(
        fn=_grouped_mm,
        guarantee=Guarantee.BATCH,
        dtypes=PRODUCTS["bmm"].dtypes,
        order=PRODUCTS["bmm"].order,
        portable=PRODUCTS["bmm"].portable,
    )
}
