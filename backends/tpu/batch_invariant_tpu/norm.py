"""rms_norm, layer_norm and group_norm on TPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.row_order import ROW_ORDER
from batch_invariant_tpu.adapter import adapted
from batch_invariant_tpu.jax.norm import group_norm, layer_norm, layer_norm_statistics, rms_norm


def _rms_norm(
    input: jax.Array,
    weight: jax.Array | None,
    eps: float | None,
    residual: jax.Array | None,
    variance_size: int | None,
    *,
    how: Any,
) -> tuple[jax.Array, jax.Array]:
    if residual is not None and residual.dtype != input.dtype:
        residual = residual.astype(input.dtype)
    out = rms_norm(
        input,
        weight,
        eps,
        residual=residual,
        variance_size=variance_size,
        interpret=how,
    )
    return (out, jnp.zeros((0,), input.dtype)) if residual is None else out


def _layer_norm(
    input: jax.Array,
    normalized_shape: Sequence[int],
    weight: jax.Array | None,
    bias: jax.Array | None,
    eps: float,
    *,
    how: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    kept = input.ndim - len(normalized_shape)
    n = math.prod(normalized_shape)
    rows = input.reshape(math.prod(input.shape[:kept]), n)
    flat = [None if p is None else p.reshape(n) for p in (weight, bias)]
    out = layer_norm(rows, *flat, eps, interpret=how)
    mean, rstd = layer_norm_statistics(rows, eps, interpret=how)
    shape = (*input.shape[:kept], *(1,) * len(normalized_shape))
    return out.reshape(input.shape), mean.reshape(shape), rstd.reshape(shape)


def _group_norm(
    input: jax.Array,
    num_groups: int,
    weight: jax.Array | None,
    bias: jax.Array | None,
    eps: float,
    *,
    how: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    out = group_norm(input, num_groups, weight, bias, eps, interpret=how)
    shape = (input.shape[0], num_groups)
    rows = input.reshape(math.prod(shape), math.prod(input.shape[1:]) // num_groups)
    mean, rstd = layer_norm_statistics(rows, eps, interpret=how)
    return out, mean.reshape(shape), rstd.reshape(shape)


KERNELS = {
    "rms_norm": adapted("rms_norm", _rms_norm, ROW_ORDER, Guarantee.SCHEDULE),
    "layer_norm": adapted("layer_norm", _layer_norm, ROW_ORDER, Guarantee.SCHEDULE),
    "group_norm": adapted("group_norm", _group_norm, ROW_ORDER),
}
