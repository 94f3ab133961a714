"""Normalisations for the proof kit: references in float64, error bounds, calls to try."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from batch_invariant.ops.contract import Case, Draw
from batch_invariant.ops.probe import Site, in_rows
from batch_invariant.ops.reduce_cases import sum_bound


def ref_rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
    variance_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    s = input if residual is None else input + residual
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    r = (s[..., :variance_size].square().mean(-1, keepdim=True) + eps).rsqrt()
    out = s * r if weight is None else s * r * weight
    return out, input.new_empty(0) if residual is None else s


def ref_layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dims = tuple(range(-len(normalized_shape), 0))
    mean_ = input.mean(dims, keepdim=True)
    rstd = (input.var(dims, correction=0, keepdim=True) + eps).rsqrt()
    out = (input - mean_) * rstd
    out = out if weight is None else out * weight
    return out if bias is None else out + bias, mean_, rstd


def ref_group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = input.reshape(input.size(0), num_groups, -1)
    mean_ = x.mean(-1)
    rstd = (x.var(-1, correction=0) + eps).rsqrt()
    out = ((x - mean_[..., None]) * rstd[..., None]).view(*input.shape[:2], -1)
    out = out if weight is None else out * weight[:, None]
    out = out if bias is None else out + bias[:, None]
    return out.view(input.shape), mean_, rstd


def bound_rms_norm(dtype: torch.dtype, **args: Any) -> torch.Tensor:
    exact = ref_rms_norm(**args)[0]
    return sum_bound(exact.abs(), exact, args["input"].size(-1) + 8, dtype)


def bound_layer_norm(dtype: torch.dtype, **args: Any) -> torch.Tensor:
    exact, mean_, rstd = ref_layer_norm(**args)
    input, weight, bias = args["input"], args["weight"], args["bias"]
    magnitude = (input.abs() + mean_.abs() + input.abs().amax()) * rstd
    magnitude = magnitude if weight is None else magnitude * weight.abs()
    magnitude = magnitude if bias is None else magnitude + bias.abs()
    return sum_bound(magnitude, exact, math.prod(args["normalized_shape"]) + 8, dtype)


def bound_group_norm(dtype: torch.dtype, **args: Any) -> torch.Tensor:
    exact, _, rstd = ref_group_norm(**args)
    magnitude = args["input"].abs().amax() * rstd.amax() * 3
    for parameter in (args["weight"], args["bias"]):
        if parameter is not None:
            magnitude = magnitude * (1 + parameter.abs().amax())
    n = exact[0].numel() // args["num_groups"]
    return sum_bound(magnitude.expand_as(exact), exact, n + 8, dtype)


def case_rms_norm(n: int, weight: bool, residual: bool, variance_size: int | None = None) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {
            "input": draw.rows(rows, n),
            "weight": draw.shared(n) if weight else None,
            "eps": 1e-6,
            "residual": draw.rows(rows, n) if residual else None,
            "variance_size": variance_size,
        }

    parts = [f"{n}", *(["weight"] if weight else []), *(["residual"] if residual else [])]
    return Case(
        " ".join([*parts, *([f"variance_size {variance_size}"] if variance_size else [])]),
        args,
        out_axes=(0, 0) if residual else (0,),
    )


def case_layer_norm(shape: tuple[int, ...], affine: bool) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {
            "input": draw.rows(rows, *shape),
            "normalized_shape": list(shape),
            "weight": draw.shared(*shape) if affine else None,
            "bias": draw.shared(*shape) if affine else None,
            "eps": 1e-5,
        }

    return Case("x".join(map(str, shape)) + (" affine" if affine else ""), args)


def case_group_norm(channels: int, inner: int, group: int) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {
            "input": draw.rows(rows, channels, inner),
            "num_groups": group,
            "weight": draw.shared(channels),
            "bias": draw.shared(channels),
            "eps": 1e-5,
        }

    return Case(f"{channels}x{inner} in {group}", args)


def probed_rms_norm(values: torch.Tensor, site: Site) -> dict[str, Any]:
    return {
        "input": in_rows(values, site),
        "weight": None,
        "eps": 0.0,
        "residual": None,
        "variance_size": None,
    }


def probed_mean(values: torch.Tensor, site: Site) -> dict[str, Any]:
    return {
        "input": in_rows(values, site),
        "normalized_shape": [values.size(1)],
        "weight": None,
        "bias": None,
        "eps": 1e-5,
    }
