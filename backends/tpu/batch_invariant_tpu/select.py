"""argmax and topk on TPU; the indices are int32 in jax, and int64 at torch's border."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.dims import normalize, reduced_shape
from batch_invariant.order import undeclared
from batch_invariant_tpu.adapter import adapted
from batch_invariant_tpu.jax import select

ORDER = undeclared("exact selection, lowest index first")


def _argmax(
    self: jax.Array, dim: int | None = None, keepdim: bool = False, *, how: Any
) -> jax.Array:
    dims = normalize(dim, self.ndim)
    rows = self.reshape(-1) if dim is None or not self.ndim else jnp.moveaxis(self, dim, -1)
    return select.argmax(rows).reshape(reduced_shape(self.shape, dims, keepdim))


def _topk(
    self: jax.Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True, *, how: Any
) -> tuple[jax.Array, jax.Array]:
    if not self.ndim:
        values, indices = select.topk(self[None], k, largest=largest)
        return values.reshape(self.shape), indices.reshape(self.shape)
    values, indices = select.topk(jnp.moveaxis(self, dim, -1), k, largest=largest)
    return jnp.moveaxis(values, -1, dim), jnp.moveaxis(indices, -1, dim)


KERNELS = {
    "argmax": adapted("argmax", _argmax, ORDER, Guarantee.SCHEDULE),
    "topk": adapted("topk", _topk, ORDER, Guarantee.SCHEDULE),
}
