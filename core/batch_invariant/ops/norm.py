"""Contracts of the normalisations: rms_norm, layer_norm, group_norm.

Order: `row_order.lane_sum` of rounded squares (two passes for layer_norm and group_norm), in fp32;
reciprocal of the correctly rounded root; multiplications left to right; one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from batch_invariant.ops.contract import Case, Draw, Op
from batch_invariant.ops.probe import SQUARES, Probe, Site, at_base, in_rows, of_rows
from batch_invariant.ops.reduce import mean, sum, sum_bound
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


def _save_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], inputs[3])
    ctx.eps, ctx.variance_size = inputs[2], inputs[4]
    ctx.mark_non_differentiable(*(() if inputs[3] is not None else (output[1],)))


def _back_rms_norm(
    ctx: Any, grad: torch.Tensor, grad_total: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    input, weight, residual = ctx.saved_tensors
    wide = stats_dtype(input.dtype)
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


def _save_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[2], inputs[3], output[1], output[2])
    ctx.normalized_shape = inputs[1]
    ctx.mark_non_differentiable(output[1], output[2])


def _back_layer_norm(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
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


def _save_group_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[2], output[1], output[2])
    ctx.num_groups = inputs[1]
    ctx.mark_non_differentiable(output[1], output[2])


def _back_group_norm(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
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


def _ref_rms_norm(
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


def _ref_layer_norm(
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


def _ref_group_norm(
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


def _bound_rms_norm(dtype: torch.dtype, **args: Any) -> torch.Tensor:
    exact = _ref_rms_norm(**args)[0]
    return sum_bound(exact.abs(), exact, args["input"].size(-1) + 8, dtype)


def _bound_layer_norm(dtype: torch.dtype, **args: Any) -> torch.Tensor:
    exact, mean_, rstd = _ref_layer_norm(**args)
    input, weight, bias = args["input"], args["weight"], args["bias"]
    magnitude = (input.abs() + mean_.abs() + input.abs().amax()) * rstd
    magnitude = magnitude if weight is None else magnitude * weight.abs()
    magnitude = magnitude if bias is None else magnitude + bias.abs()
    return sum_bound(magnitude, exact, math.prod(args["normalized_shape"]) + 8, dtype)


def _bound_group_norm(dtype: torch.dtype, **args: Any) -> torch.Tensor:
    exact, _, rstd = _ref_group_norm(**args)
    magnitude = args["input"].abs().amax() * rstd.amax() * 3
    for parameter in (args["weight"], args["bias"]):
        if parameter is not None:
            magnitude = magnitude * (1 + parameter.abs().amax())
    n = exact[0].numel() // args["num_groups"]
    return sum_bound(magnitude.expand_as(exact), exact, n + 8, dtype)


def _case_rms(n: int, weight: bool, residual: bool, variance_size: int | None = None) -> Case:
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


def _case_layer(shape: tuple[int, ...], affine: bool) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {
            "input": draw.rows(rows, *shape),
            "normalized_shape": list(shape),
            "weight": draw.shared(*shape) if affine else None,
            "bias": draw.shared(*shape) if affine else None,
            "eps": 1e-5,
        }

    return Case("x".join(map(str, shape)) + (" affine" if affine else ""), args)


def _case_group(channels: int, inner: int, group: int) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {
            "input": draw.rows(rows, channels, inner),
            "num_groups": group,
            "weight": draw.shared(channels),
            "bias": draw.shared(channels),
            "eps": 1e-5,
        }

    return Case(f"{channels}x{inner} in {group}", args)


def _probed_rms(values: torch.Tensor, site: Site) -> dict[str, Any]:
    return {
        "input": in_rows(values, site),
        "weight": None,
        "eps": 0.0,
        "residual": None,
        "variance_size": None,
    }


def _probed_mean(values: torch.Tensor, site: Site) -> dict[str, Any]:
    return {
        "input": in_rows(values, site),
        "normalized_shape": [values.size(1)],
        "weight": None,
        "bias": None,
        "eps": 1e-5,
    }


OPS = (
    Op(
        name="rms_norm",
        schema=(
            "(Tensor input, Tensor? weight, float? eps, Tensor? residual, int? variance_size)"
            " -> (Tensor, Tensor)"
        ),
        fake=_fake_rms_norm,
        reference=_ref_rms_norm,
        cases=(
            _case_rms(576, True, False),
            _case_rms(4099, False, False),
            _case_rms(1024, True, True),
            _case_rms(1024, False, True, 640),
        ),
        batch_axes={"input": 0, "residual": 0},
        schedule=tokens,
        any_size=lambda n=2100: _case_rms(n, True, True),
        error_bound=_bound_rms_norm,
        probe=Probe(
            args=_probed_rms,
            read=lambda outputs, values, site: at_base(outputs[0], values, site),
            sum_of="the squares of a row",
            **SQUARES,
        ),
        composite={"rms_norm": _rms_norm_aten},
        setup_context=_save_rms_norm,
        backward=_back_rms_norm,
    ),
    Op(
        name="layer_norm",
        schema=(
            "(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps)"
            " -> (Tensor, Tensor, Tensor)"
        ),
        fake=_fake_layer_norm,
        reference=_ref_layer_norm,
        cases=(
            _case_layer((1024,), True),
            _case_layer((4099,), False),
            _case_layer((33, 40), True),
        ),
        batch_axes={"input": 0},
        out_axes=(0, 0, 0),
        schedule=tokens,
        any_size=lambda n=2100: _case_layer((n,), True),
        error_bound=_bound_layer_norm,
        probe=Probe(
            args=_probed_mean,
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
        setup_context=_save_layer_norm,
        backward=_back_layer_norm,
    ),
    Op(
        name="group_norm",
        schema=(
            "(Tensor input, int num_groups, Tensor? weight, Tensor? bias, float eps)"
            " -> (Tensor, Tensor, Tensor)"
        ),
        fake=_fake_group_norm,
        reference=_ref_group_norm,
        cases=(_case_group(32, 49, 4), _case_group(6, 1025, 3)),
        batch_axes={"input": 0},
        out_axes=(0, 0, 0),
        any_size=lambda group=3, size=4, inner=200: _case_group(group * size, inner, group),
        error_bound=_bound_group_norm,
        aten={
            "native_group_norm": _native_group_norm,
            "native_group_norm_backward": _native_group_norm_backward,
        },
        setup_context=_save_group_norm,
        backward=_back_group_norm,
    ),
)
