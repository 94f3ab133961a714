"""cumsum on TPU, along any dimension."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from batch_invariant.order import serial
from batch_invariant_tpu.adapter import adapted, out_dtype
from batch_invariant_tpu.jax.scan import cumsum


def _cumsum(self: jax.Array, dim: int, *, dtype: Any = None, how: Any) -> jax.Array:
    if not self.ndim:
        return cumsum(self[None], dtype=out_dtype(dtype), interpret=how)[0]
    last = jnp.moveaxis(self, dim, -1)
    return jnp.moveaxis(cumsum(last, dtype=out_dtype(dtype), interpret=how), -1, dim)


KERNELS = {"cumsum": adapted("cumsum", _cumsum, serial())}
