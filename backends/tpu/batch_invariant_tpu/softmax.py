"""softmax and log_softmax on TPU, along any dimension, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.row_order import ROW_ORDER
from batch_invariant_tpu.adapter import adapted, out_dtype
from batch_invariant_tpu.jax.softmax import (
    log_softmax,
    log_softmax_backward,
    softmax,
    softmax_backward,
)


def _forward(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def forward(self: jax.Array, dim: int, dtype: Any = None, *, how: Any) -> jax.Array:
        if not self.ndim:
            return fn(self[None], dtype=out_dtype(dtype), interpret=how)[0]
        last = jnp.moveaxis(self, dim, -1)
        return jnp.moveaxis(fn(last, dtype=out_dtype(dtype), interpret=how), -1, dim)

    return forward


def _backward(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def backward(
        grad_output: jax.Array, output: jax.Array, dim: int, input_dtype: Any, *, how: Any
    ) -> jax.Array:
        if not output.ndim:
            return backward(grad_output[None], output[None], 0, input_dtype, how=how)[0]
        g, y = jnp.moveaxis(grad_output, dim, -1), jnp.moveaxis(output, dim, -1)
        out = fn(g, y, dtype=out_dtype(input_dtype), interpret=how)
        return jnp.moveaxis(out, -1, dim)

    return backward


KERNELS = {
    name: adapted(name, fn, ROW_ORDER, Guarantee.SCHEDULE)
    for name, fn in {
        "softmax": _forward(softmax),
        "log_softmax": _forward(log_softmax),
        "softmax_backward": _backward(softmax_backward),
        "log_softmax_backward": _backward(log_softmax_backward),
    }.items()
}
