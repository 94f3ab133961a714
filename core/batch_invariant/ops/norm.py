"""Contracts of the normalisations: rms_norm, layer_norm, group_norm.

Order: `row_order.lane_sum` of rounded squares (two passes for layer_norm and group_norm), in fp32;
reciprocal of the correctly rounded root; multiplications left to right; one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from batch_invariant.ops.contract import Op
from batch_invariant.ops.norm_cases import (
    bound_group_norm,
    bound_layer_norm,
    bound_rms_norm,
    case_group_norm,
    case_layer_norm,
    case_rms_norm,
    probed_mean,
    probed_rms_norm,
    ref_group_norm,
    ref_layer_norm,
    ref_rms_norm,
)
from batch_invariant.ops.norm_gradient import (
    back_group_norm,
    back_layer_norm,
    back_rms_norm,
    group_norm_backward,
    layer_norm_backward,
    save_group_norm,
    save_layer_norm,
    save_rms_norm,
)
from batch_invariant.ops.probe import SQUARES, Probe, at_base, of_rows
from batch_invariant.ops.variant import tokens


def rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    residual: torch.Tensor | None = None,
    variance_size: int | None = None,
) -> Any:
    """`s / sqrt(mean(s^2) + eps) * weight` over the last dimension, with `s = input + residual`.

    input, residual: [..., N]; weight: [N] or None. The mean square is taken over the first
    `variance_size` columns (None: all). eps None is the machine epsilon of fp32, or of float64.
    Returns [..., N] in the input's dtype; with a residual, the pair of that and `s` rounded. The
    norm uses the unrounded fp32 `s`.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    out, total = torch.ops.batch_invariant.rms_norm.default(
        input, weight, eps, residual, variance_size
    )
    return out if residual is None else (out, total)


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`(input - mean) / sqrt(var + eps) * weight + bias` over the last dimensions.

    input: [..., *normalized_shape], as `torch.nn.functional.layer_norm`; biased variance.

    Source: Ba, Kiros and Hinton, Layer Normalization, 2016.
    """
    out: torch.Tensor = torch.ops.batch_invariant.layer_norm.default(
        input, normalized_shape, weight, bias, eps
    )[0]
    return out


def group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Normalises each of `num_groups` groups of channels of each sample.

    input: [B, C, ...], weight and bias: [C], as `torch.nn.functional.group_norm`.

    Source: Wu and He, Group Normalization, 2018.
    """
    out: torch.Tensor = torch.ops.batch_invariant.group_norm.default(
        input, num_groups, weight, bias, eps
    )[0]
    return out


def check_affine(name: str, shape: Sequence[int], **parameters: torch.Tensor | None) -> None:
    """Raises unless every parameter that is given has that shape."""
    for which, parameter in parameters.items():
        if parameter is not None and list(parameter.shape) != list(shape):
            raise RuntimeError(
                f"{name}: expected {which} of shape {list(shape)}, got {list(parameter.shape)}"
            )


def check_rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor | None,
    variance_size: int | None,
) -> None:
    """Raises unless the arguments of rms_norm fit together."""
    if input.dim() == 0 or not input.dtype.is_floating_point:
        raise RuntimeError(
            f"rms_norm: expected a floating point tensor [..., N], got {input.dtype} "
            f"{list(input.shape)}"
        )
    check_affine("rms_norm", input.shape[-1:], weight=weight)
    check_affine("rms_norm", input.shape, residual=residual)
    if variance_size is not None and not 0 < variance_size <= input.size(-1):
        raise RuntimeError(
            f"rms_norm: variance_size must be in 1..{input.size(-1)}, got {variance_size}"
        )


def check_layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Raises unless normalized_shape ends the input's shape and the parameters have it."""
    wanted = list(normalized_shape)
    if not wanted or list(input.shape[-len(wanted) :]) != wanted:
        raise RuntimeError(
            f"layer_norm: expected an input of shape [*, {', '.join(map(str, wanted))}], got "
            f"{list(input.shape)}"
        )
    check_affine("layer_norm", wanted, weight=weight, bias=bias)


def check_group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Raises unless the channels split into num_groups and the parameters have one each."""
    if input.dim() < 2 or num_groups <= 0 or input.size(1) % num_groups:
        raise RuntimeError(
            "group_norm: expected [B, C, ...] with C a multiple of num_groups, got "
            f"{list(input.shape)} and num_groups={num_groups}"
        )
    check_affine("group_norm", input.shape[1:2], weight=weight, bias=bias)


def _fake_rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
    variance_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_rms_norm(input, weight, residual, variance_size)
    total = input.new_empty(0 if residual is None else input.shape)
    return input.new_empty(input.shape), total


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which means and reciprocal deviations are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stats_shape(input: torch.Tensor, normalized_shape: Sequence[int]) -> list[int]:
    """The shape of layer_norm's mean and reciprocal deviation: reduced dimensions are 1."""
    kept = input.dim() - len(normalized_shape)
    return [*input.shape[:kept], *(1,) * len(normalized_shape)]


def _fake_layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_layer_norm(input, normalized_shape, weight, bias)
    shape = stats_shape(input, normalized_shape)
    stats = input.new_empty(shape, dtype=stats_dtype(input.dtype))
    return input.new_empty(input.shape), stats, torch.empty_like(stats)


def _fake_group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_group_norm(input, num_groups, weight, bias)
    stats = input.new_empty((input.size(0), num_groups), dtype=stats_dtype(input.dtype))
    return input.new_empty(input.shape), stats, torch.empty_like(stats)


def _native_layer_norm_backward(kernel: Any, *args: Any) -> Any:
    return layer_norm_backward(*args)


def _native_group_norm_backward(kernel: Any, *args: Any) -> Any:
    return group_norm_backward(*args)


def _native_group_norm(
    kernel: Any,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    eps: float,
) -> Any:
    out, mean_, rstd = kernel(input.reshape(N, C, HxW), group, weight, bias, eps)
    return out.view(input.shape), mean_, rstd


def _rms_norm_aten(
    kernel: Any,
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    check_layer_norm(input, normalized_shape, weight, None)
    n = math.prod(normalized_shape)
    flat = None if weight is None else weight.reshape(n)
    out: torch.Tensor = kernel(
        input.reshape(
            *stats_shape(input, normalized_shape)[: input.dim() - len(normalized_shape)], n
        ),
        flat,
        eps,
        None,
        None,
    )[0]
    return out.view(input.shape)


OPS = (
    Op(
        name="rms_norm",
        schema=(
            "(Tensor input, Tensor? weight, float? eps, Tensor? residual, int? variance_size)"
            " -> (Tensor, Tensor)"
        ),
        fake=_fake_rms_norm,
        reference=ref_rms_norm,
        cases=(
            case_rms_norm(576, True, False),
            case_rms_norm(4099, False, False),
            case_rms_norm(1024, True, True),
            case_rms_norm(1024, False, True, 640),
        ),
        batch_axes={"input": 0, "residual": 0},
        schedule=tokens,
        any_size=lambda n=2100: case_rms_norm(n, True, True),
        error_bound=bound_rms_norm,
        probe=Probe(
            args=probed_rms_norm,
            read=lambda outputs, values, site: at_base(outputs[0], values, site),
            sum_of="the squares of a row",
            **SQUARES,
        ),
        composite={"rms_norm": _rms_norm_aten},
        setup_context=save_rms_norm,
        backward=back_rms_norm,
    ),
    Op(
        name="layer_norm",
        schema=(
            "(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps)"
            " -> (Tensor, Tensor, Tensor)"
        ),
        fake=_fake_layer_norm,
        reference=ref_layer_norm,
        cases=(
            case_layer_norm((1024,), True),
            case_layer_norm((4099,), False),
            case_layer_norm((33, 40), True),
        ),
        batch_axes={"input": 0},
        out_axes=(0, 0, 0),
        schedule=tokens,
        any_size=lambda n=2100: case_layer_norm((n,), True),
        error_bound=bound_layer_norm,
        probe=Probe(
            args=probed_mean,
            read=lambda outputs, values, site: of_rows(outputs[1], site)[:, 0],
            divided=True,
            result=stats_dtype,
            stock=torch.native_layer_norm,
            sum_of="the elements of a row, for the mean",
            limits=("the squares stand behind the mean, which every term moves: not seen",),
        ),
        aten={
            "native_layer_norm": None,
            "native_layer_norm_backward": _native_layer_norm_backward,
        },
        setup_context=save_layer_norm,
        backward=back_layer_norm,
    ),
    Op(
        name="group_norm",
        schema=(
            "(Tensor input, int num_groups, Tensor? weight, Tensor? bias, float eps)"
            " -> (Tensor, Tensor, Tensor)"
        ),
        fake=_fake_group_norm,
        reference=ref_group_norm,
        cases=(case_group_norm(32, 49, 4), case_group_norm(6, 1025, 3)),
        batch_axes={"input": 0},
        out_axes=(0, 0, 0),
        any_size=lambda group=3, size=4, inner=200: case_group_norm(group * size, inner, group),
        error_bound=bound_group_norm,
        aten={
            "native_group_norm": _native_group_norm,
            "native_group_norm_backward": _native_group_norm_backward,
        },
        setup_context=save_group_norm,
        backward=back_group_norm,
    ),
)
