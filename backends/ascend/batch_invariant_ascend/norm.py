"""rms_norm, layer_norm and group_norm on Ascend: `row_sum`, one root, products left to right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.norm import (
    check_group_norm,
    check_layer_norm,
    check_rms_norm,
    stats_shape,
)
from batch_invariant.stock import stock
from batch_invariant_ascend import row_sum as sums
from batch_invariant_ascend.dtypes import DTYPES, check_dtype
from batch_invariant_ascend.reduce import divided
from batch_invariant_ascend.row_sum import row_sum
from batch_invariant_ascend.tiers import Tier


def rstd(mean_square: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean_square + eps)."""
    root = stock("sqrt", "PrivateUse1")(mean_square + eps)
    return torch.ones_like(root) / root


def rms_rows(
    s: torch.Tensor, weight: torch.Tensor | None, eps: float, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of fp32 rows [rows, n] by the mean square of the first `size` columns, and rstd."""
    if sums.choice().tier is Tier.C and size == s.size(1) and s.numel():
        from batch_invariant_ascend.row_kernels import rms_norm

        return rms_norm(
            s.contiguous(), None if weight is None else weight.float().contiguous(), eps
        )
    head = s[:, :size]
    r = rstd(divided(row_sum(head * head), size), eps)
    out = s * r[:, None]
    return (out if weight is None else out * weight.float()), r


def _rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
    variance_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_rms_norm(input, weight, residual, variance_size)
    check_dtype("rms_norm", input, weight, residual)
    n = input.size(-1)
    s = input.float() if residual is None else input.float() + residual.float()
    rows = s.reshape(-1 if n else input.shape[:-1].numel(), n)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    out, _ = rms_rows(rows, weight, eps, n if variance_size is None else variance_size)
    total = input.new_empty(0) if residual is None else s.to(input.dtype)
    return out.to(input.dtype).view(input.shape), total


def _normalized(rows: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of mean 0 and deviation 1, the means and the reciprocal deviations."""
    n = rows.size(1)
    mean = divided(row_sum(rows), n)
    centred = rows - mean[:, None]
    r = rstd(divided(row_sum(centred * centred), n), eps)
    return centred * r[:, None], mean, r


def _layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_layer_norm(input, normalized_shape, weight, bias)
    check_dtype("layer_norm", input, weight, bias)
    n = math.prod(normalized_shape)
    kept = input.shape[: input.dim() - len(normalized_shape)]
    out, mean, r = _normalized(input.float().reshape(kept.numel(), n), eps)
    out = out if weight is None else out * weight.float().reshape(n)
    out = out if bias is None else out + bias.float().reshape(n)
    shape = stats_shape(input, normalized_shape)
    return out.to(input.dtype).view(input.shape), mean.view(shape), r.view(shape)


def _group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_group_norm(input, num_groups, weight, bias)
    check_dtype("group_norm", input, weight, bias)
    batch, channels = input.shape[:2]
    if input.numel() == 0:
        stats = input.new_zeros(batch, num_groups, dtype=torch.float32)
        return torch.empty_like(input), stats, stats.clone()
    out, mean, r = _normalized(input.float().reshape(batch * num_groups, -1), eps)
    out = out.view(batch, channels, -1)
    out = out if weight is None else out * weight.float()[:, None]
    out = out if bias is None else out + bias.float()[:, None]
    shape = (batch, num_groups)
    return out.to(input.dtype).view(input.shape), mean.view(shape), r.view(shape)


def kernels() -> dict[str, Kernel]:
    """By operator name."""
    chosen = sums.choice()
    ours = chosen.tier in (Tier.C, Tier.D)

    def kernel(fn: Any, level: Guarantee) -> Kernel:
        return Kernel(
            fn=fn,
            guarantee=level if ours else Guarantee.BATCH,
            dtypes=DTYPES,
            order=sums.order(),
            **chosen.shown,
        )

    return {
        "rms_norm": kernel(_rms_norm, Guarantee.SCHEDULE),
        "layer_norm": kernel(_layer_norm, Guarantee.SCHEDULE),
        "group_norm": kernel(_group_norm, Guarantee.BATCH),
    }
