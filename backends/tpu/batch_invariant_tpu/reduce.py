"""sum, mean, prod, var, std, norm and logsumexp on TPU, over any dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.dims import normalize, reduced_shape
from batch_invariant.ops.row_order import ROW_ORDER
from batch_invariant_tpu.adapter import adapted, out_dtype
from batch_invariant_tpu.jax import reduce, reduce_forward


def _rows(x: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    """[rows, n], n over the reduced dimensions in row-major order."""
    kept = [d for d in range(x.ndim) if d not in dims]
    n = math.prod(x.shape[d] for d in dims)
    return jnp.transpose(x, (*kept, *dims)).reshape(math.prod(x.shape[d] for d in kept), n)


def _over(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def reduction(
        self: jax.Array,
        dim: Any = None,
        keepdim: bool = False,
        *,
        dtype: Any = None,
        how: Any,
    ) -> jax.Array:
        dims = normalize(dim, self.ndim)
        out = fn(_rows(self, dims), out_dtype(dtype), how)
        return out.reshape(reduced_shape(self.shape, dims, keepdim))

    return reduction


_FUNCTIONS: dict[str, Callable[..., jax.Array]] = {
    "sum": lambda rows, dtype, how: reduce.sum(rows, dtype=dtype, interpret=how),
    "mean": lambda rows, dtype, how: reduce.mean(rows, dtype=dtype, interpret=how),
    "prod": lambda rows, dtype, how: reduce_forward.prod(rows, dtype=dtype, interpret=how),
    "logsumexp": lambda rows, dtype, how: reduce.logsumexp(rows, interpret=how),
}


def _spread(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def reduction(
        self: jax.Array,
        dim: Any = None,
        *,
        correction: Any = None,
        keepdim: bool = False,
        how: Any,
    ) -> jax.Array:
        dims = normalize(dim, self.ndim)
        degrees = 1 if correction is None else correction
        out = fn(_rows(self, dims), correction=degrees, interpret=how)
        return out.reshape(reduced_shape(self.shape, dims, keepdim))

    return reduction


def _norm(
    self: jax.Array,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
    how: Any,
) -> jax.Array:
    dims = normalize(dim, self.ndim)
    out = reduce_forward.norm(_rows(self, dims), ord, dtype=out_dtype(dtype), interpret=how)
    return out.reshape(reduced_shape(self.shape, dims, keepdim))


_ALL = {name: _over(fn) for name, fn in _FUNCTIONS.items()} | {
    "var": _spread(reduce_forward.var),
    "std": _spread(reduce_forward.std),
    "norm": _norm,
}

KERNELS = {name: adapted(name, fn, ROW_ORDER, Guarantee.SCHEDULE) for name, fn in _ALL.items()}
