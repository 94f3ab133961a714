"""Elementwise functions on CPU: torch's own kernels, with every element in their vector body.

Nothing is added across elements: a result has the bits of the vector body at any length, position,
stride and number of threads. Which payload a NaN carries is not promised. What varies on one
machine is in docs/benchmarks/elementwise_variance.json; the table holds more, because other CPUs
differ.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from batch_invariant.backend import Kernel
from batch_invariant.cpu.arithmetic import (
    Arithmetic,
    IndexAdd,
    has_alpha,
    has_complex,
    refuse_complex,
)
from batch_invariant.cpu.overloads import bind, has_kernel, variants
from batch_invariant.cpu.vector_body import (
    Function,
    Into,
    VectorBody,
    body_of,
    each,
    or_torchs_error,
    split_of,
    tensors_of,
)
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.order import undeclared
from batch_invariant.stock import stock

VECTOR_LIBRARY = "the vector body calls a vector math library, the scalar tail libm"
SEVERAL_ROUNDINGS = "several roundings, which a compiler may fuse in one body and not in the other"
SPECIAL_VALUES = "the two bodies differ in NaN or in the sign of a zero"
COMPLEX = "exact for real numbers; complex ones take several roundings"
ALPHA = "exact with alpha=1; any other multiplies first, rounded in between or not"

COVERED: dict[str, str] = {
    name: reason
    for reason, names in {
        VECTOR_LIBRARY: """
            acos acosh angle asin asinh atan atan2 atanh cos cosh digamma elu elu_backward erf erfc
            erfinv exp exp2 expm1 gelu gelu_backward hypot i0 igamma igammac lgamma log log10 log1p
            log2 log_sigmoid_backward log_sigmoid_forward logaddexp logaddexp2 logit mish
            mish_backward polygamma pow.Tensor_Scalar pow.Tensor_Tensor rsqrt sigmoid silu
            silu_backward sin sinc sinh softplus softplus_backward special_airy_ai
            special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 special_entr
            special_erfcx special_i0e special_i1 special_i1e special_log_ndtr
            special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0
            special_modified_bessel_k1 special_ndtri special_scaled_modified_bessel_k0
            special_scaled_modified_bessel_k1 special_spherical_bessel_j0 special_xlog1py
            special_zeta sqrt tan tanh xlogy.Tensor
        """,
        SEVERAL_ROUNDINGS: """
            addcdiv addcmul div.Tensor_mode floor_divide fmod.Tensor frac
            hardsigmoid hardsigmoid_backward hardswish hardswish_backward lerp.Scalar lerp.Tensor
            logit_backward reciprocal remainder.Tensor round.decimals sgn sigmoid_backward
            tanh_backward
        """,
        SPECIAL_VALUES: """
            clamp.Tensor clamp_max.Tensor clamp_min.Tensor fmax fmin hardshrink hardshrink_backward
            hardtanh_backward maximum minimum softshrink softshrink_backward
        """,
        COMPLEX: "abs div.Tensor mul.Tensor neg",
        ALPHA: "add.Tensor sub.Tensor",
    }.items()
    for name in names.split()
}
"""Why each functional overload is covered; its out= and in-place overloads are, too."""

LOSSES = ("binary_cross_entropy", "huber_loss", "mse_loss", "smooth_l1_loss")
"""Elementwise losses, and their derivatives: a reduction is left to the dispatcher."""

GATED_UNITS = ("glu", "glu_backward")
"""Elementwise in the two halves of one argument."""

SELECTIONS = ("amax", "amin", "aminmax", "max", "min")
"""Reductions that return an element, and either of +0 and -0 where both are extreme: here +0."""


@functools.cache
def overrides() -> dict[str, Function]:
    """The aten overloads that change on CPU, by name; each callable takes the keyset first.

    The kernels of torch are captured by the first call, which comes before any is overridden.
    """
    found: dict[str, Function] = {}
    for name, reason in COVERED.items():
        if not has_kernel(name):
            continue
        for variant, writes in variants(name):
            fn: Function = body_of(name) if variant == name else Into(name, variant, writes)
            if reason in (ALPHA, COMPLEX):
                inexact = has_alpha if reason == ALPHA else has_complex
                fn = Arithmetic(fn, variant, writes, inexact)
            if name.startswith("lerp"):
                fn = _Real(variant, fn)
            found[variant] = functools.partial(_without_keyset, fn)
    for name in LOSSES:
        backward = f"{name}_backward"
        found |= _with_variants(name, functools.partial(_loss, body_of(name), name))
        found |= _with_variants(
            backward, functools.partial(_loss_backward, body_of(backward), backward)
        )
    for variant, _ in variants("index_add"):
        found[variant] = functools.partial(_without_keyset, IndexAdd(variant))
    found |= _with_variants("glu", _glu)
    found |= _with_variants("glu_backward", _glu_backward)
    for name in SELECTIONS:
        for variant, _ in variants(name):
            found[variant] = functools.partial(_without_keyset, _PositiveZero(variant))
    return found


def _without_keyset(fn: Function, _keyset: Any, *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)


def _with_variants(name: str, fn: Function) -> dict[str, Function]:
    """Overrides of a functional overload by `fn`, and of its out= overloads by `fn` and a copy."""
    found: dict[str, Function] = {}
    for variant, writes in variants(name):
        kernel = stock(variant)
        if writes:
            found[variant] = functools.partial(_copy_into, fn, kernel, writes)
        else:
            found[variant] = functools.partial(_without_keyset, fn)
    return found


def _copy_into(
    fn: Function, kernel: Function, writes: list[str], _keyset: Any, *args: Any, **kwargs: Any
) -> Any:
    inputs = {k: v for k, v in kwargs.items() if k not in writes}
    values = or_torchs_error(fn, args, inputs, kernel, kwargs)
    result = kernel(*args, **kwargs)
    for name, value in zip(writes, each(values), strict=True):
        kwargs[name].resize_(value.shape).copy_(value)
    return result


class _Real:
    """A function that is covered for real numbers alone."""

    def __init__(self, name: str, fn: Function) -> None:
        self.name = name
        self.fn = fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        refuse_complex(self.name, *tensors_of(args))
        return self.fn(*args, **kwargs)


class _PositiveZero:
    """A reduction that selects, with +0 for either zero: which of a tie it meets first varies."""

    def __init__(self, variant: str) -> None:
        self.kernel = stock(variant)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.kernel(*args, **kwargs)
        for extreme in each(result):
            if extreme.is_floating_point():
                stock("add_.Tensor")(extreme, torch.zeros((), dtype=extreme.dtype))
        return result


_MEAN, _SUM = 1, 2


def _loss(function: VectorBody, name: str, *args: Any, **kwargs: Any) -> Any:
    """The loss of every element, then torch's own mean or sum, which has its override."""
    bound = bind(name, args, kwargs)
    reduction = bound["reduction"]
    losses = function(*(bound | {"reduction": 0}).values())
    if reduction == _MEAN:
        return losses.mean()
    return losses.sum() if reduction == _SUM else losses


def _loss_backward(function: VectorBody, name: str, *args: Any, **kwargs: Any) -> Any:
    """The derivative for a sum; that of a mean is divided by the number of elements."""
    bound = bind(name, args, kwargs)
    if bound["reduction"] != _MEAN:
        return function(*bound.values())
    return function(*(bound | {"reduction": _SUM}).values()).div_(bound["self"].numel())


def _glu(self: Tensor, dim: int = -1) -> Tensor:
    """glu on the halves, side by side in one flat tensor."""
    odd = self.dim() == 0 or self.size(dim) % 2
    out: Tensor = stock("glu")(self, dim) if odd else _halves(*self.chunk(2, dim))
    return out


def _glu_backward(grad_output: Tensor, self: Tensor, dim: int) -> Tensor:
    if self.dim() == 0 or self.size(dim) % 2:
        raised: Tensor = stock("glu_backward")(grad_output, self, dim)
        return raised
    return torch.cat(_halves_backward(grad_output, *self.chunk(2, dim)), dim)


def _paired(a: Tensor, b: Tensor) -> Tensor:
    out: Tensor = stock("glu")(torch.cat([a.view(-1), b.view(-1)]), 0)
    return out.view(a.shape)


def _paired_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    pair = torch.cat([a.view(-1), b.view(-1)])
    into_a, into_b = stock("glu_backward")(grad.view(-1), pair, 0).chunk(2)
    return into_a.view(a.shape), into_b.view(b.shape)


_halves = VectorBody(_paired, split_of("glu"))
_halves_backward = VectorBody(_paired_backward, split_of("glu_backward"))


def _kernel(overload: str, *more: torch.dtype) -> Kernel:
    def fn(*args: Any, **kwargs: Any) -> Any:
        return body_of(overload)(*args, **kwargs)

    return Kernel(
        fn=fn,
        guarantee=Guarantee.PARALLEL,
        dtypes=frozenset((*FLOATS, torch.float64, *more)),
        order=undeclared("nothing is added across elements"),
    )


_COMPLEX = (torch.complex64, torch.complex128)
KERNELS = {
    **{
        name: _kernel(name, *_COMPLEX) for name in "exp log rsqrt sin cos tanh sigmoid silu".split()
    },
    "erf": _kernel("erf"),
    "gelu": _kernel("gelu"),
    "pow": _kernel("pow.Tensor_Scalar", *_COMPLEX),
}
