"""softmax and log_softmax over the last dimension, and their derivatives."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from batch_invariant_tpu.jax.launch import Interpret, check_dtype
from batch_invariant_tpu.jax.reduce import MAXIMUM
from batch_invariant_tpu.jax.rows import RowProgram, Statistic, rounded, run

_EXPONENTIALS = Statistic(lambda tiles, found: jnp.exp(tiles[0] - found[0]))


def _softmax_result(tiles: Any, found: Any, shared: Any) -> list[jax.Array]:
    return [jnp.exp(tiles[0] - found[0]) / found[1]]


def _log_softmax_result(tiles: Any, found: Any, shared: Any) -> list[jax.Array]:
    return [tiles[0] - found[0] - jnp.log(found[1])]


_FORWARD = {
    False: RowProgram("softmax", (MAXIMUM, _EXPONENTIALS), _softmax_result),
    True: RowProgram("log_softmax", (MAXIMUM, _EXPONENTIALS), _log_softmax_result),
}
_BACKWARD = {
    False: RowProgram(
        "softmax_backward",
        (Statistic(lambda tiles, found: rounded(tiles[0] * tiles[1])),),
        lambda tiles, found, shared: [(tiles[0] - found[0]) * tiles[1]],
    ),
    True: RowProgram(
        "log_softmax_backward",
        (Statistic(lambda tiles, found: tiles[0]),),
        lambda tiles, found, shared: [tiles[0] - rounded(jnp.exp(tiles[1]) * found[0])],
    ),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _forward(x: jax.Array, log: bool, dtype: Any, interpret: Interpret) -> jax.Array:
    if not x.size:
        return x.astype(dtype)
    (out,) = run(_FORWARD[log], [x.reshape(-1, x.shape[-1])], [], [dtype], interpret)
    return out.reshape(x.shape)


def _fwd(x: jax.Array, log: bool, dtype: Any, interpret: Interpret) -> tuple[jax.Array, Any]:
    out = _forward(x, log, dtype, interpret)
    return out, (out, jnp.zeros((), x.dtype))


def _bwd(log: bool, dtype: Any, interpret: Interpret, saved: Any, g: jax.Array) -> tuple[jax.Array]:
    out, like = saved
    return (_derivative(g, out, log, like.dtype, interpret),)


_forward.defvjp(_fwd, _bwd)


def _derivative(
    g: jax.Array, out: jax.Array, log: bool, dtype: Any, interpret: Interpret
) -> jax.Array:
    if not g.size:
        return g.astype(dtype)
    n = g.shape[-1]
    rows = [g.reshape(-1, n), out.reshape(-1, n)]
    return run(_BACKWARD[log], rows, [], [dtype], interpret)[0].reshape(g.shape)


def softmax(x: jax.Array, *, dtype: Any = None, interpret: Interpret = False) -> jax.Array:
    """exp(x) / sum(exp(x)) over the last dimension, [..., n].

    float32 or bfloat16; the exact maximum, the fp32 sum in the order of `reduce.sum`, one division,
    rounded once to `dtype` (None: the input's).
    """
    check_dtype("softmax", x)
    return _forward(x, False, jnp.dtype(dtype or x.dtype), interpret)


def log_softmax(x: jax.Array, *, dtype: Any = None, interpret: Interpret = False) -> jax.Array:
    """log(softmax(x)) over the last dimension, with the order of `softmax`."""
    check_dtype("log_softmax", x)
    return _forward(x, True, jnp.dtype(dtype or x.dtype), interpret)


def softmax_backward(
    grad: jax.Array, out: jax.Array, *, dtype: Any = None, interpret: Interpret = False
) -> jax.Array:
    """The gradient of softmax's input from that of its output `out`; one sum a row."""
    check_dtype("softmax_backward", grad, out)
    return _derivative(grad, out, False, jnp.dtype(dtype or grad.dtype), interpret)


def log_softmax_backward(
    grad: jax.Array, out: jax.Array, *, dtype: Any = None, interpret: Interpret = False
) -> jax.Array:
    """The gradient of log_softmax's input from that of its output `out`; one sum a row."""
    check_dtype("log_softmax_backward", grad, out)
    return _derivative(grad, out, True, jnp.dtype(dtype or grad.dtype), interpret)
