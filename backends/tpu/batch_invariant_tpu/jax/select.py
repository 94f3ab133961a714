"""argmax, topk and embedding: selections and copies. Nothing is added, so plain jax is exact.

The rules of core's `ops/select.py`: among equal values the lowest index comes first, and NaN is the
largest value. Each index is decided by integer comparisons alone, so no order can change it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from batch_invariant.errors import OpNotSupported
from batch_invariant_tpu.jax.launch import check_dtype


@jax.jit
def argmax(x: jax.Array) -> jax.Array:
    """The index of the largest value over the last dimension, [..., n] -> [...], int32."""
    check_dtype("argmax", x)
    n = x.shape[-1]
    if not n:
        raise OpNotSupported(f"argmax: expected at least one element, got {list(x.shape)}")
    ranks = _ranks(x)
    largest = ranks == ranks.max(-1, keepdims=True)
    places = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.where(largest, places, n).min(-1)


@functools.partial(jax.jit, static_argnames=("k", "largest"))
def topk(x: jax.Array, k: int, *, largest: bool = True) -> tuple[jax.Array, jax.Array]:
    """The k largest (or smallest) values over the last dimension and their int32 indices.

    Best first.
    """
    check_dtype("topk", x)
    if not 0 <= k <= x.shape[-1]:
        raise OpNotSupported(f"topk: k must be in 0..{x.shape[-1]}, got {k}")
    ranks = _ranks(x)
    places = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    keys = ~ranks if largest else ranks
    _, order = lax.sort((keys, places), dimension=-1, num_keys=2)
    indices = order[..., :k]
    return jnp.take_along_axis(x, indices, -1), indices


@jax.jit
def embedding(weight: jax.Array, indices: jax.Array) -> jax.Array:
    """`weight[indices]`: weight [V, D], integer indices [...]; returns [..., D].

    An index outside of 0..V-1 gives a row of NaN, since a compiled program cannot raise.
    """
    check_dtype("embedding", weight)
    if weight.ndim != 2 or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise OpNotSupported(
            f"embedding: expected [V, D] and integer indices, got {list(weight.shape)} and "
            f"{indices.dtype}"
        )
    count = weight.shape[0]
    known = jnp.where((indices < 0) | (indices >= count), count, indices)
    return jnp.take(weight, known, axis=0, mode="fill", fill_value=jnp.nan)


def _ranks(x: jax.Array) -> jax.Array:
    """int32 in the order of the values: both zeros alike, NaN above all."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # negative: the larger, the less
    ordered = jnp.where(x == 0, 0, ordered)
    return jnp.where(jnp.isnan(x), 0x7FFFFFFF, ordered)
