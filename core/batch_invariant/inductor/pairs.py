"""Operators that a compiled graph calls where it finds two of them in a row, with the same bits.

A backend that has a kernel for such a pair (`Backend.fused_kernels`) saves writing and reading what
lies between: a hand-written RMSNorm is `x.float().pow(2).mean(-1)`, whose squares would otherwise
go to memory in fp32.
"""

from __future__ import annotations

from typing import Any

import torch

from batch_invariant import selector

NAMESPACE = "batch_invariant_fused"
PARTS = {"mean_square": "mean"}
"""By name, the contract whose order and guarantee an operator has."""

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(
    "mean_square(Tensor self, int[1]? dim, bool keepdim) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _mean_square(self: torch.Tensor, dim: Any, keepdim: bool) -> torch.Tensor:
    out: torch.Tensor = selector.current_backend(self.device).fused_kernels()["mean_square"](
        self, dim, keepdim
    )
    return out


def _fake_mean_square(self: torch.Tensor, dim: Any, keepdim: bool) -> torch.Tensor:
    out: torch.Tensor = torch.ops.batch_invariant.mean.default(self.float(), dim, keepdim)
    return out


_library.impl("mean_square", _mean_square, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::mean_square", _fake_mean_square, lib=_library)
