"""Contracts of the elementwise functions that vendors compute differently by position.

Nothing is added across elements, yet CPU kernels use other instructions for the tail of a tensor
than for its body, so an element's bits can depend on where it stands. Here they depend on its
value alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.ops.contract import FLOATS, Case, Draw, Op
from batch_invariant.ops.variant import tokens

ATEN = frozenset(
    """
    acos acosh addcdiv addcmul angle asin asinh atan atan2 atanh binary_cross_entropy
    binary_cross_entropy_backward cos cosh digamma elu elu_backward erf erfc erfinv exp exp2 expm1
    floor_divide fmax fmin fmod frac gelu gelu_backward glu glu_backward hardshrink
    hardshrink_backward hardsigmoid hardsigmoid_backward hardswish hardswish_backward
    hardtanh_backward huber_loss huber_loss_backward hypot i0 igamma igammac lerp lgamma log log10
    log1p log2 log_sigmoid_backward log_sigmoid_forward logaddexp logaddexp2 logit logit_backward
    maximum minimum mish mish_backward mse_loss mse_loss_backward polygamma pow reciprocal remainder
    rsqrt sgn sigmoid sigmoid_backward silu silu_backward sin sinc sinh smooth_l1_loss
    smooth_l1_loss_backward softplus softplus_backward softshrink softshrink_backward
    special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1
    special_entr special_erfcx special_i0e special_i1 special_i1e special_log_ndtr
    special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0
    special_modified_bessel_k1 special_ndtri special_scaled_modified_bessel_k0
    special_scaled_modified_bessel_k1 special_spherical_bessel_j0 special_xlog1py special_zeta sqrt
    tan tanh tanh_backward xlogy
    """.split()
)
"""Aten operators whose result elements depend on one element of each argument, by name.

Whether their kernels compute an element alike wherever it stands is for each backend to know: they
are covered by overrides (on CPUs) or declared harmless (where one thread computes one element).
"""


def exp(self: torch.Tensor) -> torch.Tensor:
    """e to the power of every element."""
    return _call("exp", self)


def log(self: torch.Tensor) -> torch.Tensor:
    """The natural logarithm of every element."""
    return _call("log", self)


def rsqrt(self: torch.Tensor) -> torch.Tensor:
    """1 / sqrt of every element."""
    return _call("rsqrt", self)


def sin(self: torch.Tensor) -> torch.Tensor:
    """The sine of every element, in radians."""
    return _call("sin", self)


def cos(self: torch.Tensor) -> torch.Tensor:
    """The cosine of every element, in radians."""
    return _call("cos", self)


def tanh(self: torch.Tensor) -> torch.Tensor:
    """The hyperbolic tangent of every element."""
    return _call("tanh", self)


def erf(self: torch.Tensor) -> torch.Tensor:
    """The error function of every element."""
    return _call("erf", self)


def sigmoid(self: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x)) of every element."""
    return _call("sigmoid", self)


def silu(self: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x) of every element."""
    return _call("silu", self)


def gelu(self: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """x * Phi(x) of every element; `approximate` is "none" (erf) or "tanh".

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.
    """
    return _call("gelu", self, approximate=approximate)


def pow(self: torch.Tensor, exponent: float) -> torch.Tensor:
    """Every element to the power of one number."""
    return _call("pow", self, exponent)


def _call(name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    out: torch.Tensor = getattr(torch.ops.batch_invariant, name).default(*args, **kwargs)
    return out


def _fake(self: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    dtype = self.dtype if self.dtype.is_floating_point else torch.get_default_dtype()
    return torch.empty_like(self, dtype=dtype)


def _fake_pow(self: torch.Tensor, exponent: Any) -> torch.Tensor:
    return torch.empty_like(self, dtype=torch.result_type(self, exponent))


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.exponent = inputs[1] if len(inputs) > 1 else None


def _save_gelu(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: torch.Tensor
) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.approximate = keyword_only_inputs["approximate"]


def _d_gelu(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if ctx.approximate == "tanh":
        k = math.sqrt(2 / math.pi)
        t = tanh(k * (x + 0.044715 * x * x * x))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x)
    phi = exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + erf(x / math.sqrt(2))) + x * phi


def _d_silu(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


def _d_pow(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    exponent: float = ctx.exponent
    return torch.zeros_like(x) if exponent == 0 else exponent * pow(x, exponent - 1)


_Derivative = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def _back(derivative: _Derivative, arguments: int = 1) -> Callable[..., Any]:
    def back(ctx: Any, grad: torch.Tensor) -> Any:
        x, y = ctx.saved_tensors
        gx = (grad * derivative(ctx, x, y)).to(x.dtype)
        return gx if arguments == 1 else (gx, *(None,) * (arguments - 1))

    return back


def _bound(exact: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Four units of fp32, relative to the larger of result and argument, and one rounding."""
    wide = torch.finfo(torch.float32 if dtype != torch.float64 else dtype).eps
    magnitude = exact.abs() + torch.where(exact.abs() < 1, x.abs().clamp(max=1), 0)
    return 8 * wide * magnitude + torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny


def _sized(positive: bool, shape: tuple[int, ...], **arguments: Any) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        x = 3 * draw.normal(rows, *shape)
        return {"self": (x.abs() + 0.01 if positive else x).to(draw.dtype), **arguments}

    return Case("x".join(map(str, shape)), args)


def _shaped(positive: bool, **arguments: Any) -> tuple[Case, ...]:
    shapes = ((1,), (65,), (1536,), (3, 1003))
    return tuple(_sized(positive, shape, **arguments) for shape in shapes)


def _op(
    name: str,
    function: Callable[..., torch.Tensor],
    derivative: _Derivative,
    positive: bool = False,
    floor: float = 0.0,
) -> Op:
    return Op(
        name=name,
        schema="(Tensor self) -> Tensor",
        fake=_fake,
        reference=function,
        cases=_shaped(positive),
        batch_axes={"self": 0},
        schedule=tokens,
        any_size=lambda n=2100: _sized(positive, (n,)),
        error_bound=lambda self, dtype: _bound(function(self), self, dtype) + floor,
        setup_context=_save,
        backward=_back(derivative),
        dtypes=FLOATS,
    )


OPS = (
    _op("exp", torch.exp, lambda ctx, x, y: y),
    _op("log", torch.log, lambda ctx, x, y: 1 / x, positive=True),
    _op("rsqrt", torch.rsqrt, lambda ctx, x, y: -0.5 * y / x, positive=True),
    _op("sin", torch.sin, lambda ctx, x, y: cos(x)),
    _op("cos", torch.cos, lambda ctx, x, y: -sin(x)),
    _op("tanh", torch.tanh, lambda ctx, x, y: 1 - y * y),
    # Vendors approximate erf with an absolute error, also where it is close to zero.
    _op("erf", torch.erf, lambda ctx, x, y: 2 / math.sqrt(math.pi) * exp(-x * x), floor=1e-6),
    _op("sigmoid", torch.sigmoid, lambda ctx, x, y: y * (1 - y)),
    _op("silu", torch.nn.functional.silu, _d_silu),
    Op(
        name="gelu",
        schema='(Tensor self, *, str approximate="none") -> Tensor',
        fake=_fake,
        reference=torch.nn.functional.gelu,
        cases=(*_shaped(False, approximate="none"), *_shaped(False, approximate="tanh")),
        batch_axes={"self": 0},
        schedule=tokens,
        any_size=lambda n=2100: _sized(False, (n,), approximate="none"),
        error_bound=lambda self, approximate, dtype: (
            _bound(torch.nn.functional.gelu(self, approximate=approximate), self, dtype) * 2
        ),
        setup_context=_save_gelu,
        backward=_back(_d_gelu),
    ),
    Op(
        name="pow",
        schema="(Tensor self, Scalar exponent) -> Tensor",
        fake=_fake_pow,
        reference=torch.pow,
        cases=(*_shaped(True, exponent=1.7), *_shaped(False, exponent=3)),
        batch_axes={"self": 0},
        schedule=tokens,
        any_size=lambda n=2100: _sized(True, (n,), exponent=1.7),
        error_bound=lambda self, exponent, dtype: (
            _bound(torch.pow(self, exponent), self, dtype) * 16
        ),
        setup_context=_save,
        backward=_back(_d_pow, 2),
    ),
)
