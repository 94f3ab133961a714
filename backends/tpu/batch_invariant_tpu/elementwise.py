"""The elementwise functions on TPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from batch_invariant.guarantee import Guarantee
from batch_invariant.order import undeclared
from batch_invariant_tpu.adapter import adapted
from batch_invariant_tpu.jax.elementwise import elementwise, pow

ORDER = undeclared("nothing is added across elements")
_NAMES = "exp log rsqrt sin cos tanh erf sigmoid silu".split()

ATEN = {name: name for name in (*_NAMES, "gelu")} | {"pow.Tensor_Scalar": "pow"}
"""The aten overloads that are these functions. In-place and out= ones are refused by the mode."""


def _of(name: str) -> Callable[..., jax.Array]:
    def function(self: jax.Array, *, how: Any) -> jax.Array:
        return elementwise(name, self, interpret=how)

    return function


def _gelu(self: jax.Array, *, approximate: str = "none", how: Any) -> jax.Array:
    name = "gelu" if approximate == "none" else "gelu_tanh"
    return elementwise(name, self, interpret=how)


def _pow(self: jax.Array, exponent: float, *, how: Any) -> jax.Array:
    return pow(self, exponent, interpret=how)


KERNELS = {
    name: adapted(name, fn, ORDER, Guarantee.SCHEDULE)
    for name, fn in {**{name: _of(name) for name in _NAMES}, "gelu": _gelu, "pow": _pow}.items()
}
