"""cumsum over the last dimension: every row one serial fp32 chain from its first element.

The chains of 128 rows run beside one another, one in each lane of a register, so a step adds one
element to every chain, and no addition is left to the compiler to arrange.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from batch_invariant_tpu.jax.blocks import LANE
from batch_invariant_tpu.jax.launch import Interpret, check_dtype, launch, pad

STEPS = 256
"""Elements of a chain that one block holds; it changes no bit."""


def _kernel(x_ref: Any, out_ref: Any, total_ref: Any) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    def step(i: Any, total: jax.Array) -> jax.Array:
        total = total + x_ref[pl.ds(i, 1), :]
        out_ref[pl.ds(i, 1), :] = jnp.where(jnp.isnan(total), jnp.nan, total)
        return total

    total_ref[...] = lax.fori_loop(0, STEPS, step, total_ref[...])


@functools.partial(jax.jit, static_argnums=1)
def _call(columns: jax.Array, interpret: Interpret) -> jax.Array:
    """[n, M] in fp32, multiples of the block."""
    n, m = columns.shape
    spec = pl.BlockSpec((STEPS, LANE), lambda i, s: (s, i))
    (out,) = launch(
        _kernel,
        [columns],
        name="bi_cumsum",
        grid=(m // LANE, n // STEPS),
        semantics=("parallel", "arbitrary"),
        in_specs=[spec],
        out_specs=[spec],
        out_shape=[jax.ShapeDtypeStruct((n, m), jnp.float32)],
        scratch=[pltpu.VMEM((1, LANE), jnp.float32)],
        interpret=interpret,
    )
    return out


def cumsum(x: jax.Array, *, dtype: Any = None, interpret: Interpret = False) -> jax.Array:
    """The running sum over the last dimension, [..., n] -> [..., n]; without a gradient.

    float32 or bfloat16, added in fp32 one after another; every prefix is rounded on its own to
    `dtype` (None: the input's).
    """
    check_dtype("cumsum", x)
    dtype = jnp.dtype(dtype or x.dtype)
    if not x.size:
        return x.astype(dtype)
    n = x.shape[-1]
    rows = x.reshape(-1, n)
    columns = pad(pad(rows.T.astype(jnp.float32), 0, STEPS), 1, LANE)
    out = _call(columns, interpret)[:n, : len(rows)].T
    return out.astype(dtype).reshape(x.shape)
