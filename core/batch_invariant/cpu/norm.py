"""rms_norm, layer_norm and group_norm on CPU: native rows; plain torch order for float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.cpu import rows
from batch_invariant.cpu.reduce import cast
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.norm import (
    check_group_norm,
    check_layer_norm,
    check_rms_norm,
    stats_dtype,
    stats_shape,
)
from batch_invariant.ops.row_order import ROW_ORDER, lane_sum


def _parameter(p: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A weight as the native kernels take it: contiguous, of the input's dtype or fp32."""
    if p is None:
        return None
    return (p if p.dtype == dtype else p.float()).contiguous()


def _rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
    variance_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_rms_norm(input, weight, residual, variance_size)
    n = input.size(-1)
    eps = torch.finfo(stats_dtype(input.dtype)).eps if eps is None else eps
    size = n if variance_size is None else variance_size
    x = cast(input, None).contiguous().view(-1 if n else input.numel(), n)
    other = None if residual is None else residual.to(x.dtype).contiguous().view(x.shape)
    if x.dtype == torch.float64:
        s = x if other is None else x + other
        head = s[:, :size]
        r = 1 / (lane_sum(head * head) / size + eps).sqrt()
        out = s * r[:, None]
        out = out if weight is None else out * weight.double()
        total = s
    else:
        out, rounded = rows.rms_norm(x, _parameter(weight, x.dtype), eps, other, size)
        total = x if rounded is None else rounded
    if residual is None:
        return out.view(input.shape), input.new_empty(0)
    return out.view(input.shape), total.view(input.shape)


def _normalize_rows(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    spatial: int,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """layer_norm over the rows of a matrix; weight and bias as native/rows.h spreads them."""
    if x.dtype != torch.float64:
        if weight is not None and bias is not None and weight.dtype != bias.dtype:
            weight, bias = weight.float(), bias.float()
        return rows.layer_norm(
            x, _parameter(weight, x.dtype), _parameter(bias, x.dtype), eps, spatial, groups
        )
    n = x.size(1)
    mean = lane_sum(x) / n
    centred = x - mean[:, None]
    rstd = 1 / (lane_sum(centred * centred) / n + eps).sqrt()
    out = centred * rstd[:, None]

    def spread(p: torch.Tensor) -> torch.Tensor:
        if not spatial:
            return p.double()
        return p.double().repeat_interleave(spatial).view(groups, n).repeat(len(x) // groups, 1)

    out = out if weight is None else out * spread(weight)
    out = out if bias is None else out + spread(bias)
    return out, mean, rstd


def _layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_layer_norm(input, normalized_shape, weight, bias)
    n = math.prod(normalized_shape)
    x = (
        cast(input, None)
        .contiguous()
        .view(-1 if n else math.prod(input.shape[: input.dim() - len(normalized_shape)]), n)
    )
    flat = [None if p is None else p.reshape(n) for p in (weight, bias)]
    out, mean, rstd = _normalize_rows(x, flat[0], flat[1], eps, 0, 0)
    shape = stats_shape(input, normalized_shape)
    return out.view(input.shape), mean.view(shape), rstd.view(shape)


def _group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_group_norm(input, num_groups, weight, bias)
    batch, channels = input.shape[:2]
    spatial = math.prod(input.shape[2:])
    if input.numel() == 0:
        stats = input.new_zeros(batch, num_groups, dtype=stats_dtype(input.dtype))
        return torch.empty_like(input), stats, stats.clone()
    x = cast(input, None).contiguous().view(batch * num_groups, channels // num_groups * spatial)
    out, mean, rstd = _normalize_rows(x, weight, bias, eps, spatial, num_groups)
    return out.view(input.shape), mean.view(batch, num_groups), rstd.view(batch, num_groups)


def _kernel(fn: Callable[..., Any], guarantee: Guarantee = Guarantee.SCHEDULE) -> Kernel:
    return Kernel(
        fn=fn,
        guarantee=guarantee,
        dtypes=frozenset((*FLOATS, torch.float64)),
        order=ROW_ORDER,
        portable=frozenset(FLOATS),
    )


KERNELS = {
    "rms_norm": _kernel(_rms_norm),
    "layer_norm": _kernel(_layer_norm),
    "group_norm": _kernel(_group_norm, Guarantee.BATCH),
}
