"""rms_norm, layer_norm and group_norm on CUDA, in the order of `rows.py`.

Lane sums of rounded squares, the reciprocal of the correctly rounded root, multiplications left to
right, one rounding: the bits of the CPU reference. float64 runs the same order in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from batch_invariant.backend import Kernel
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
from batch_invariant_cuda import norm_long, segments
from batch_invariant_cuda.norm_kernels import held, held_sums, segment, walked
from batch_invariant_cuda.reduce import cast, finish
from batch_invariant_cuda.reduce_ops import CENTRED_RSTD, MEAN, RSTD, TERM_OF
from batch_invariant_cuda.row_launch import LONG_WARPS, Calls, Plan, is_long, kind_of, plan_of


def _parameter(p: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A weight as the kernels take it: contiguous, of the input's dtype or fp32."""
    if p is None:
        return None
    return (p if p.dtype == dtype else p.float()).contiguous()


def _split_rows(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
    centred: bool,
    groups: int,
    spatial: int,
    shape: Plan,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    n = x.size(1)
    mean = None
    op, kind = RSTD.value, segments.NO_SHIFT.value
    if centred:
        sums = segments.lanes(x, None, kind, TERM_OF[MEAN.value], shape)
        mean = finish(sums, None, MEAN.value, float(n), 0.0, torch.float32)
        op, kind = CENTRED_RSTD.value, segments.ROW_SHIFT.value
    lanes = segments.lanes(x, mean, kind, TERM_OF[op], shape)
    rstd = finish(lanes, None, op, float(n), eps, torch.float32)
    count = segments.segments_of(n)
    segment(
        len(x) * count,
        (x, weight, bias, mean, rstd, out),
        (n // shape.unit, count, groups, spatial),
        (centred, weight is not None, bias is not None, groups > 0, shape.unit),
        8,
        shape.wide,
    )
    return mean, rstd


def norm_rows(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    centred: bool,
    residual: torch.Tensor | None = None,
    variance_size: int | None = None,
    groups: int = 0,
    spatial: int = 1,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """rms_norm or, `centred`, layer_norm of the rows of contiguous x [rows, n].

    weight, bias: [n], or with `groups` one entry per channel: element j of row i uses entry
    (i % groups) * (n // spatial) + j // spatial. Returns the result and, where they exist, the
    rounded x + residual, and mean and reciprocal deviation [rows] in fp32.
    """
    rows, n = x.shape
    out = torch.empty_like(x)
    size = n if variance_size is None else variance_size
    total = None if residual is None else torch.empty_like(x)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device) if centred else None
    rstd = None if mean is None else torch.empty_like(mean)
    if not x.numel():
        for stat in (mean, rstd):
            if stat is not None:
                stat.fill_(math.nan)
        return out, total, mean, rstd
    weight, bias = _parameter(weight, x.dtype), _parameter(bias, x.dtype)
    shape = plan_of(x, residual)
    others = (residual, weight, bias, out, total, mean, rstd)
    found = _launch(x, others, size, groups, spatial, eps, shape)
    if found is None:
        if residual is not None:
            x = x.float() + residual.float()
            total = x.to(out.dtype).masked_fill_(x.isnan(), math.nan)
        mean, rstd = _split_rows(x, weight, bias, out, eps, centred, groups, spatial, shape)
        return out, total, mean, rstd
    kernel, launch = found
    kernel(*launch)
    return out, total, mean, rstd


def _launch(
    x: torch.Tensor,
    others: Sequence[torch.Tensor | None],
    size: int,
    groups: int,
    spatial: int,
    eps: float,
    shape: Plan,
) -> Any:
    """A kernel and its launch; None for rows that are split, which several launches handle."""
    residual, weight, bias, _, _, mean, _ = others
    tensors = (x, *others)
    rows, n = x.shape
    numbers = (n // shape.unit, size, groups, spatial, float(size), eps)
    centred, summed = mean is not None, residual is not None
    affine = (weight is not None, bias is not None, groups > 0)
    static: tuple[Any, ...]
    if size == n:
        found = None if centred or affine[1] else norm_long.launch_of(tensors, float(n), eps, shape)
        if found is not None or shape.split:
            return found
    if not shape.tiles:
        static = (centred, summed, *affine, shape.unit)
        warps = LONG_WARPS if summed and is_long(n, shape) else shape.warps
        return walked, (rows, tensors, numbers, static, warps, shape.wide)
    plan = (shape.width, shape.parts, shape.tiles, shape.full, shape.unit)
    # A row on many warps waits for its parts: what comes after the sum is fetched before it.
    static = (centred, summed, size != n, *affine, *plan, shape.warps == 16)
    kernel = held_sums if summed else held
    return kernel, (rows, tensors, numbers, static, shape.warps, shape.wide)


_calls = Calls()


def _rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
    variance_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    key = (kind_of(input), kind_of(weight), kind_of(residual), eps, variance_size)
    call = _calls.find(key)
    if call is not None:
        found: tuple[torch.Tensor, torch.Tensor] = call(input, weight, residual)
        return found
    out = _first_rms_norm(input, weight, eps, residual, variance_size)
    call = _repeat(input, weight, eps, residual, variance_size, out)
    if call is not None:
        _calls.keep(key, call)
    return out


def _repeat(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
    variance_size: int | None,
    outputs: tuple[torch.Tensor, torch.Tensor],
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """The same call again as a launch and nothing else, where it is one launch on what is given."""
    given = [t for t in (x, weight, residual) if t is not None]
    if not x.is_cuda or x.dtype not in FLOATS or not x.numel():
        return None
    if any(not t.is_contiguous() for t in given) or _parameter(weight, x.dtype) is not weight:
        return None
    if residual is not None and residual.dtype != x.dtype:
        return None
    n = x.size(-1)
    matrix = x.view(-1, n)
    other = None if residual is None else residual.view(-1, n)
    shape = plan_of(matrix, other)
    size = n if variance_size is None else variance_size
    eps = torch.finfo(stats_dtype(x.dtype)).eps if eps is None else eps
    out, total = outputs
    others = (other, weight, None, out, None if other is None else total, None, None)
    made = _launch(matrix, others, size, 0, 1, eps, shape)
    if made is None:
        return None
    kernel, launch = made
    start = kernel.repeat(*launch)
    if start is None:
        return None
    empty = torch.empty_like

    def alone(
        x: torch.Tensor, weight: torch.Tensor | None, residual: None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = empty(x)
        w = None if weight is None else weight.data_ptr()
        start(x.data_ptr(), None, w, None, out.data_ptr(), None, None, None)
        return out, x.new_empty(0)

    def summed(
        x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, total = empty(x), empty(x)
        w = None if weight is None else weight.data_ptr()
        sums = total.data_ptr()
        start(x.data_ptr(), residual.data_ptr(), w, None, out.data_ptr(), sums, None, None)
        return out, total

    return alone if residual is None else summed


def _first_rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None,
    variance_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_rms_norm(input, weight, residual, variance_size)
    n = input.size(-1)
    eps = torch.finfo(stats_dtype(input.dtype)).eps if eps is None else eps
    x = cast(input, None).contiguous().view(-1 if n else input.numel(), n)
    other = None if residual is None else residual.to(x.dtype).contiguous().view(x.shape)
    if x.dtype == torch.float64:
        total = x if other is None else x + other
        head = total[:, : n if variance_size is None else variance_size]
        r = 1 / (lane_sum(head * head) / head.size(1) + eps).sqrt()
        out = total * r[:, None]
        out = out if weight is None else out * weight.double()
    else:
        out, rounded_sum, _, _ = norm_rows(
            x, weight, None, eps, centred=False, residual=other, variance_size=variance_size
        )
        total = x if rounded_sum is None else rounded_sum
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
    if x.dtype != torch.float64:
        out, _, mean, rstd = norm_rows(
            x, weight, bias, eps, centred=True, groups=groups, spatial=max(spatial, 1)
        )
        if mean is None or rstd is None:
            raise RuntimeError("a centred norm has a mean and a deviation")
        return out, mean, rstd
    n = x.size(1)
    mean = lane_sum(x) / n
    centred = x - mean[:, None]
    rstd = 1 / (lane_sum(centred * centred) / n + eps).sqrt()
    out = centred * rstd[:, None]

    def spread(p: torch.Tensor) -> torch.Tensor:
        if not groups:
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
    rows = math.prod(input.shape[: input.dim() - len(normalized_shape)])
    x = cast(input, None).contiguous().view(rows, n)
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
    if input.numel() == 0:
        stats = input.new_zeros(batch, num_groups, dtype=stats_dtype(input.dtype))
        return torch.empty_like(input), stats, stats.clone()
    spatial = math.prod(input.shape[2:])
    x = cast(input, None).contiguous().view(batch * num_groups, channels // num_groups * spatial)
    out, mean, rstd = _normalize_rows(x, weight, bias, eps, spatial, num_groups)
    return out.view(input.shape), mean.view(batch, num_groups), rstd.view(batch, num_groups)


def _kernel(fn: Callable[..., Any], guarantee: Guarantee) -> Kernel:
    return Kernel(
        fn=fn,
        guarantee=guarantee,
        dtypes=frozenset((*FLOATS, torch.float64)),
        order=ROW_ORDER,
        portable=frozenset(FLOATS),
    )


KERNELS = {
    "rms_norm": _kernel(_rms_norm, Guarantee.SCHEDULE),
    "layer_norm": _kernel(_layer_norm, Guarantee.SCHEDULE),
    "group_norm": _kernel(_group_norm, Guarantee.BATCH),
}
