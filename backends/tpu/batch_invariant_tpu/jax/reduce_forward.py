"""prod, var, std and norm over the last dimension, in the order of `rows.py`; without gradients."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from batch_invariant.errors import OpNotSupported
from batch_invariant_tpu.jax.launch import Interpret, check_dtype
from batch_invariant_tpu.jax.rows import RowProgram, Statistic, divided, rounded, run

_PROD = RowProgram(
    "prod",
    (Statistic(lambda tiles, found: tiles[0], kind="product"),),
    lambda tiles, found, shared: [found[0]],
    reduces=True,
)


def _root(square: jax.Array) -> jax.Array:
    return rounded(jnp.sqrt(square))


@functools.cache
def _spread(n: int, correction: float, root: bool) -> RowProgram:
    def square(tiles: Any, found: Any) -> jax.Array:
        centred = tiles[0] - found[0]
        return rounded(centred * centred)

    def finish(squares: jax.Array) -> jax.Array:
        variance = divided(squares, max(0.0, n - correction))
        return _root(variance) if root else variance

    average = Statistic(lambda tiles, found: tiles[0], lambda sums: divided(sums, n))
    return RowProgram(
        "std" if root else "var",
        (average, Statistic(square, finish)),
        lambda tiles, found, shared: [found[1]],
        reduces=True,
    )


@functools.cache
def _norm(order: float) -> RowProgram:
    sign = -1.0 if order < 0 else 1.0
    if math.isinf(order):
        statistic = Statistic(
            lambda tiles, found: sign * jnp.abs(tiles[0]), jnp.abs, kind="maximum"
        )
    elif order == 0:
        statistic = Statistic(lambda tiles, found: jnp.where(tiles[0] == 0, 0.0, 1.0))
    elif order == 1:
        statistic = Statistic(lambda tiles, found: jnp.abs(tiles[0]))
    elif order == 2:
        statistic = Statistic(lambda tiles, found: rounded(tiles[0] * tiles[0]), _root)
    else:
        statistic = Statistic(
            lambda tiles, found: rounded(jnp.power(jnp.abs(tiles[0]), order)),
            lambda total: jnp.power(total, 1 / order),
        )
    return RowProgram("norm", (statistic,), lambda tiles, found, shared: [found[0]], reduces=True)


def _reduced(
    program: RowProgram, x: jax.Array, dtype: Any, empty: float, interpret: Interpret
) -> jax.Array:
    check_dtype(program.name, x)
    dtype = jnp.dtype(dtype or x.dtype)
    if not x.shape[-1]:
        return jnp.full(x.shape[:-1], empty, dtype)
    (out,) = run(program, [x.reshape(-1, x.shape[-1])], [], [dtype], interpret)
    return out.reshape(x.shape[:-1])


def prod(x: jax.Array, *, dtype: Any = None, interpret: Interpret = False) -> jax.Array:
    """The product over the last dimension, in fp32 and the order of `sum`, rounded once."""
    return _reduced(_PROD, x, dtype, 1.0, interpret)


def var(x: jax.Array, *, correction: float = 1, interpret: Interpret = False) -> jax.Array:
    """The variance over the last dimension, [..., n] -> [...].

    Two passes: the fp32 mean, then the sum of the rounded squares of what is left, divided by
    max(0, n - correction); rounded once.
    """
    program = _spread(x.shape[-1], float(correction), False)
    return _reduced(program, x, None, math.nan, interpret)


def std(x: jax.Array, *, correction: float = 1, interpret: Interpret = False) -> jax.Array:
    """The root of the fp32 variance over the last dimension."""
    program = _spread(x.shape[-1], float(correction), True)
    return _reduced(program, x, None, math.nan, interpret)


def norm(
    x: jax.Array, ord: float = 2, *, dtype: Any = None, interpret: Interpret = False
) -> jax.Array:
    """The vector norm of any order over the last dimension, [..., n] -> [...].

    ord 2: root of the sum of rounded squares; 1: sum of magnitudes; 0: count of non-zeros; inf and
    -inf: the exact extreme; others: by powers. Rounded once to `dtype` (None: the input's).
    """
    if not x.shape[-1] and (ord < 0 or ord == math.inf):
        raise OpNotSupported(f"norm: order {ord} has no value for an empty dimension")
    return _reduced(_norm(float(ord)), x, dtype, 0.0, interpret)
