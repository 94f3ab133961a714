"""sum, mean and logsumexp over the last dimension, in the order of `rows.py`.

These have gradients; the reductions without one are in `reduce_forward.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from batch_invariant_tpu.jax.launch import Interpret, check_dtype
from batch_invariant_tpu.jax.rows import RowProgram, Statistic, canonical, divided, run

MAXIMUM = Statistic(lambda tiles, found: tiles[0], kind="maximum")


def _shifted(tiles: Any, found: Any) -> jax.Array:
    return jnp.exp(tiles[0] - _finite(found[0]))


def _finite(top: jax.Array) -> jax.Array:
    """The maximum, or 0 where it is infinite: inf - inf would be a NaN."""
    return jnp.where(jnp.abs(top) == jnp.inf, 0.0, top)


_TOTAL = Statistic(lambda tiles, found: tiles[0])
_SUM = RowProgram("sum", (_TOTAL,), lambda tiles, found, shared: [found[0]], reduces=True)
_LOGSUMEXP = RowProgram(
    "logsumexp",
    (MAXIMUM, Statistic(_shifted)),
    lambda tiles, found, shared: [canonical(jnp.log(found[1]) + _finite(found[0]))],
    reduces=True,
)


@functools.cache
def _mean(n: int) -> RowProgram:
    return RowProgram(
        "mean", (_TOTAL,), lambda tiles, found, shared: [divided(found[0], n)], reduces=True
    )


def _reduced(program: RowProgram, x: jax.Array, dtype: Any, interpret: Interpret) -> jax.Array:
    check_dtype(program.name, x)
    (out,) = run(program, [x.reshape(-1, x.shape[-1])], [], [dtype], interpret)
    return out.reshape(x.shape[:-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _sum(x: jax.Array, dtype: Any, interpret: Interpret) -> jax.Array:
    if not x.shape[-1]:
        return jnp.zeros(x.shape[:-1], dtype)
    return _reduced(_SUM, x, dtype, interpret)


def _sum_fwd(x: jax.Array, dtype: Any, interpret: Interpret) -> tuple[jax.Array, jax.Array]:
    return _sum(x, dtype, interpret), x


def _sum_bwd(dtype: Any, interpret: Interpret, x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return (jnp.broadcast_to(g[..., None], x.shape).astype(x.dtype),)


_sum.defvjp(_sum_fwd, _sum_bwd)


def sum(x: jax.Array, *, dtype: Any = None, interpret: Interpret = False) -> jax.Array:
    """The sum over the last dimension, [..., n] -> [...].

    float32 or bfloat16, added in fp32 in the order of core's `ops/row_order.py`, rounded once to
    `dtype` (None: the input's). A NaN is the quiet one.
    """
    check_dtype("sum", x)
    return _sum(x, jnp.dtype(dtype or x.dtype), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _mean_of(x: jax.Array, dtype: Any, interpret: Interpret) -> jax.Array:
    if not x.shape[-1]:
        return jnp.full(x.shape[:-1], jnp.nan, dtype)
    return _reduced(_mean(x.shape[-1]), x, dtype, interpret)


def _mean_fwd(x: jax.Array, dtype: Any, interpret: Interpret) -> tuple[jax.Array, jax.Array]:
    return _mean_of(x, dtype, interpret), x


def _mean_bwd(dtype: Any, interpret: Interpret, x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    each = g.astype(jnp.float32) / x.shape[-1]
    return (jnp.broadcast_to(each[..., None], x.shape).astype(x.dtype),)


_mean_of.defvjp(_mean_fwd, _mean_bwd)


def mean(x: jax.Array, *, dtype: Any = None, interpret: Interpret = False) -> jax.Array:
    """The mean over the last dimension: the fp32 sum of `sum`, divided by n, rounded once."""
    check_dtype("mean", x)
    return _mean_of(x, jnp.dtype(dtype or x.dtype), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _logsumexp(x: jax.Array, interpret: Interpret) -> jax.Array:
    if not x.shape[-1]:
        return jnp.full(x.shape[:-1], -jnp.inf, x.dtype)
    return _reduced(_LOGSUMEXP, x, x.dtype, interpret)


def _logsumexp_fwd(x: jax.Array, interpret: Interpret) -> tuple[jax.Array, Any]:
    out = _logsumexp(x, interpret)
    return out, (x, out)


def _logsumexp_bwd(interpret: Interpret, saved: Any, g: jax.Array) -> tuple[jax.Array]:
    x, out = saved
    weights = jnp.exp(x.astype(jnp.float32) - out.astype(jnp.float32)[..., None])
    return ((g.astype(jnp.float32)[..., None] * weights).astype(x.dtype),)


_logsumexp.defvjp(_logsumexp_fwd, _logsumexp_bwd)


def logsumexp(x: jax.Array, *, interpret: Interpret = False) -> jax.Array:
    """log(sum(exp(x))) over the last dimension.

    The exact maximum plus the logarithm of the fp32 sum of `exp(x - maximum)` in the order of
    `sum`, rounded once.
    """
    check_dtype("logsumexp", x)
    return _logsumexp(x, interpret)
