"""mm, addmm, bmm, baddbmm and linear on TPU: the one kernel of `jax/matmul.py`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from batch_invariant.order import undeclared
from batch_invariant_tpu.adapter import adapted
from batch_invariant_tpu.jax.matmul import product

ORDER = undeclared("chunks of 512 over k, ascending; inside one, the matrix unit's order")


def _mm(self: jax.Array, mat2: jax.Array, *, how: Any) -> jax.Array:
    return product(self[None], mat2[None], interpret=how)[0]


def _addmm(
    self: jax.Array,
    mat1: jax.Array,
    mat2: jax.Array,
    *,
    beta: float = 1,
    alpha: float = 1,
    how: Any,
) -> jax.Array:
    m, n = mat1.shape[0], mat2.shape[1]
    rows = self.shape[0] if self.ndim == 2 else 1  # one row stays one, and is read for all
    addend = None if beta == 0 else jnp.broadcast_to(self, (1, rows if rows == m else 1, n))
    return product(mat1[None], mat2[None], addend, alpha=alpha, beta=beta, interpret=how)[0]


def _bmm(self: jax.Array, mat2: jax.Array, *, how: Any) -> jax.Array:
    return product(self, mat2, interpret=how)


def _baddbmm(
    self: jax.Array,
    batch1: jax.Array,
    batch2: jax.Array,
    *,
    beta: float = 1,
    alpha: float = 1,
    how: Any,
) -> jax.Array:
    shape = (*batch1.shape[:2], batch2.shape[2])
    addend = None if beta == 0 else jnp.broadcast_to(self, shape)
    return product(batch1, batch2, addend, alpha=alpha, beta=beta, interpret=how)


def _linear(
    input: jax.Array, weight: jax.Array, bias: jax.Array | None = None, *, how: Any
) -> jax.Array:
    matrix = weight.reshape(-1, weight.shape[-1])
    rows = input.reshape(1, -1 if input.shape[-1] else _rows(input), input.shape[-1])
    addend, n = None, matrix.shape[0]
    if bias is not None and bias.ndim <= 1:  # one row stays one, and is read for all
        addend = jnp.broadcast_to(bias, (1, 1, n))
    elif bias is not None:
        addend = jnp.broadcast_to(bias, (*input.shape[:-1], n)).reshape(1, -1, n)
    out = product(rows, matrix[None], addend, transposed=True, interpret=how)
    return out.reshape(*input.shape[:-1], *weight.shape[:-1])


def _rows(x: jax.Array) -> int:
    count = 1
    for size in x.shape[:-1]:
        count *= size
    return count


KERNELS = {
    name: adapted(name, fn, ORDER)
    for name, fn in {
        "mm": _mm,
        "addmm": _addmm,
        "bmm": _bmm,
        "baddbmm": _baddbmm,
        "linear": _linear,
    }.items()
}
