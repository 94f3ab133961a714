"""scaled_dot_product_attention on TPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from batch_invariant.order import undeclared
from batch_invariant_tpu.adapter import adapted
from batch_invariant_tpu.jax.attention import CHUNK, attention

ORDER = undeclared(
    f"chunks of {CHUNK} keys, ascending, a running maximum; inside one, the matrix unit's order"
)


@functools.partial(
    jax.jit, static_argnames=("dropout_p", "is_causal", "scale", "enable_gqa", "how")
)
def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attn_mask: jax.Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    how: Any,
) -> tuple[jax.Array, jax.Array]:
    lead = query.shape[:-2]
    if not enable_gqa:
        lead = jnp.broadcast_shapes(lead, key.shape[:-2], value.shape[:-2])
    four = []
    for x in (query, key, value):
        heads = (*lead[:-1], x.shape[-3]) if enable_gqa else lead
        four.append(_four(jnp.broadcast_to(x, (*heads, *x.shape[-2:]))))
    if attn_mask is not None:
        whole = (*query.shape[:-1], key.shape[-2])
        attn_mask = _four(jnp.broadcast_to(attn_mask, whole))
    out, lse = attention(
        *four, mask=attn_mask, causal=is_causal, scale=scale, with_lse=True, interpret=how
    )
    return out.reshape(*lead, *out.shape[-2:]), lse.reshape(*lead, lse.shape[-1])


def _four(x: jax.Array) -> jax.Array:
    """[batch, heads, rows, columns] of an array of any rank from 2."""
    if x.ndim <= 4:
        return x.reshape((1,) * (4 - x.ndim) + x.shape)
    return x.reshape(-1, *x.shape[-3:])


KERNELS = {
    "scaled_dot_product_attention": adapted("scaled_dot_product_attention", _attention, ORDER)
}
