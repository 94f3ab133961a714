"""Elementwise functions, each a kernel of its own, so that no neighbour in a program changes it.

Nothing is added across elements. XLA may fuse its own elementwise operators with others and round
what is between them differently from program to program; a kernel is compiled by itself, in one
block shape, computes in fp32 and rounds once. Without gradients: under `grad` take jax's own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from batch_invariant.errors import OpNotSupported
from batch_invariant_tpu.jax.launch import Interpret, check_dtype, pad
from batch_invariant_tpu.jax.rows import LANES, RowProgram, rounded, run

# erf(x) = x * P(x^2) / Q(x^2) up to x = 3.95, where it rounds to 1: a minimax fit in relative error
# (2.1e-8), from the constant term on.
_ERF_P = (
    *("0x1.20dd74p+0", "0x1.884a50p-3", "0x1.b12734p-5"),
    *("0x1.f32150p-9", "0x1.2a839ap-12", "0x1.0fea30p-19"),
)
_ERF_Q = (
    *("0x1.000000p+0", "0x1.0194b4p-1", "0x1.d53b78p-4"),
    *("0x1.ed5192p-7", "0x1.32e464p-10", "0x1.3d5b38p-15"),
)


def _polynomial(coefficients: Sequence[str], x: jax.Array) -> jax.Array:
    """By Horner's rule, every product rounded before the sum."""
    y = jnp.full_like(x, float.fromhex(coefficients[-1]))
    for coefficient in reversed(coefficients[:-1]):
        y = rounded(y * x) + float.fromhex(coefficient)
    return y


def _erf(x: jax.Array) -> jax.Array:
    """XLA's own expansion has other bits in another program on a CPU."""
    inside = jnp.clip(x, -3.95, 3.95)
    square = rounded(inside * inside)
    quotient = rounded(_polynomial(_ERF_P, square) / _polynomial(_ERF_Q, square))
    inner = jnp.clip(rounded(inside * quotient), -1.0, 1.0)
    return jnp.where(x >= 3.95, 1.0, jnp.where(x <= -3.95, -1.0, inner))


def _silu(x: jax.Array) -> jax.Array:
    return x * lax.logistic(x)


def _gelu(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1.0 + _erf(rounded(x * math.sqrt(0.5))))


def _gelu_tanh(x: jax.Array) -> jax.Array:
    inner = math.sqrt(2 / math.pi) * (x + rounded(0.044715 * x * x * x))
    return 0.5 * x * (1.0 + jnp.tanh(inner))


FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "exp": jnp.exp,
    "log": jnp.log,
    "rsqrt": lambda x: 1.0 / rounded(jnp.sqrt(x)),
    "sin": jnp.sin,
    "cos": jnp.cos,
    "tanh": jnp.tanh,
    "erf": _erf,
    "sigmoid": lax.logistic,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
"""By name, of a tile in fp32."""


def elementwise(name: str, x: jax.Array, *, interpret: Interpret = False) -> jax.Array:
    """One of `FUNCTIONS` of every element, in fp32, rounded once to the input's dtype."""
    check_dtype(name, x)
    if name not in FUNCTIONS:
        raise OpNotSupported(f"unknown function {name!r}; known: {', '.join(FUNCTIONS)}")
    return _applied(_program(name), x, interpret)


def pow(x: jax.Array, exponent: float, *, interpret: Interpret = False) -> jax.Array:
    """Every element to the power of one number; whole numbers up to 64 by multiplications."""
    check_dtype("pow", x)
    return _applied(_power(float(exponent)), x, interpret)


@functools.cache
def _program(name: str) -> RowProgram:
    fn = FUNCTIONS[name]
    return RowProgram(name, (), lambda tiles, found, shared: [fn(tiles[0])])


@functools.cache
def _power(exponent: float) -> RowProgram:
    def power(x: jax.Array) -> jax.Array:
        if exponent.is_integer() and abs(exponent) <= 64:
            return lax.integer_pow(x, int(exponent))
        return lax.pow(x, jnp.full_like(x, exponent))

    return RowProgram("pow", (), lambda tiles, found, shared: [power(tiles[0])])


def _applied(program: RowProgram, x: jax.Array, interpret: Interpret) -> jax.Array:
    if not x.size:
        return x
    rows = pad(x.reshape(-1), 0, LANES).reshape(-1, LANES)
    (out,) = run(program, [rows], [], [x.dtype], interpret)
    return out.reshape(-1)[: x.size].reshape(x.shape)
