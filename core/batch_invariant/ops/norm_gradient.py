"""The gradients of the normalisations, by the library's own sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from batch_invariant.ops.reduce import mean, sum


def save_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], inputs[3])
    ctx.eps, ctx.variance_size = inputs[2], inputs[4]
    ctx.mark_non_differentiable(*(() if inputs[3] is not None else (output[1],)))


def back_rms_norm(
    ctx: Any, grad: torch.Tensor, grad_total: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    input, weight, residual = ctx.saved_tensors
    wide = torch.promote_types(input.dtype, torch.float32)
    s = input.to(wide) if residual is None else input.to(wide) + residual.to(wide)
    g = grad.to(wide)
    size = ctx.variance_size or s.size(-1)
    eps = torch.finfo(wide).eps if ctx.eps is None else ctx.eps
    r = 1 / (mean(s[..., :size].square(), -1, True) + eps).sqrt()
    gw = g if weight is None else g * weight.to(wide)
    inner = sum(gw * s, -1, True) * r * r * r / size
    gs = gw * r
    if size == s.size(-1):
        gs = gs - inner * s
    else:
        gs = torch.cat([gs[..., :size] - inner * s[..., :size], gs[..., size:]], -1)
    if residual is not None and grad_total is not None:
        gs = gs + grad_total.to(wide)
    g_weight = None
    if weight is not None and ctx.needs_input_grad[1]:
        g_weight = sum((g * s * r).reshape(-1, s.size(-1)), 0).to(weight.dtype)
    return (
        gs.to(input.dtype),
        g_weight,
        None,
        None if residual is None else gs.to(residual.dtype),
        None,
    )


def layer_norm_derivative(
    grad: torch.Tensor,
    input: torch.Tensor,
    mean_: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a normalisation over rows of `[rows, n]`, in the dtype of the statistics.

    input, grad: [rows, n]; mean_, rstd: [rows, 1]; weight: [groups, n] or None, row i using
    weight[i % groups]. Returns grad of the input, and the terms of the gradients of weight and
    bias before they are summed over rows.
    """
    wide = rstd.dtype
    x = (input.to(wide) - mean_) * rstd
    g = grad.to(wide)
    gw = g
    if weight is not None:
        gw = (g.view(-1, groups, g.size(-1)) * weight.to(wide)).view_as(g)
    n = x.size(-1)
    gx = rstd * (gw - sum(gw, -1, True) / n - x * (sum(gw * x, -1, True) / n))
    return gx, g * x, g


def layer_norm_backward(
    grad_out: torch.Tensor,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of layer_norm with the arguments of aten::native_layer_norm_backward."""
    n = math.prod(normalized_shape)
    rows = (-1, n)
    gx, terms_w, terms_b = layer_norm_derivative(
        grad_out.reshape(rows),
        input.reshape(rows),
        mean.reshape(-1, 1),
        rstd.reshape(-1, 1),
        None if weight is None else weight.reshape(1, n),
        1,
    )
    return (
        gx.to(input.dtype).view(input.shape) if output_mask[0] else None,
        sum(terms_w, 0).to(input.dtype).view(tuple(normalized_shape)) if output_mask[1] else None,
        sum(terms_b, 0).to(input.dtype).view(tuple(normalized_shape)) if output_mask[2] else None,
    )


def group_norm_backward(
    grad_out: torch.Tensor,
    input: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    output_mask: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of group_norm with the arguments of aten::native_group_norm_backward."""
    n = C // group * HxW
    spread = None
    if weight is not None:
        spread = weight.reshape(group, C // group, 1).expand(-1, -1, HxW).reshape(group, n)
    gx, terms_w, terms_b = layer_norm_derivative(
        grad_out.reshape(N * group, n),
        input.reshape(N * group, n),
        mean.reshape(-1, 1),
        rstd.reshape(-1, 1),
        spread,
        group,
    )

    def per_channel(terms: torch.Tensor) -> torch.Tensor:
        return sum(terms.view(N, C, HxW), (0, 2)).to(input.dtype)

    return (
        gx.to(input.dtype).view(input.shape) if output_mask[0] else None,
        per_channel(terms_w) if output_mask[1] else None,
        per_channel(terms_b) if output_mask[2] else None,
    )


def save_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[2], inputs[3], output[1], output[2])
    ctx.normalized_shape = inputs[1]
    ctx.mark_non_differentiable(output[1], output[2])


def back_layer_norm(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    input, weight, bias, mean_, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad
    gx, gw, gb = layer_norm_backward(
        grad,
        input,
        ctx.normalized_shape,
        mean_,
        rstd,
        weight,
        bias,
        (needs[0], needs[2], needs[3]),
    )
    return gx, None, gw, gb, None


def save_group_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[2], output[1], output[2])
    ctx.num_groups = inputs[1]
    ctx.mark_non_differentiable(output[1], output[2])


def back_group_norm(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    input, weight, mean_, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad
    N, C = input.shape[:2]
    gx, gw, gb = group_norm_backward(
        grad,
        input,
        mean_,
        rstd,
        weight,
        N,
        C,
        input.numel() // max(N * C, 1),
        ctx.num_groups,
        (needs[0], needs[2], needs[3]),
    )
    return gx, None, gw, gb, None
