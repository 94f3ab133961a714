"""Contracts of softmax and log_softmax and of their derivatives.

Order: exact maximum, fp32 exp of the differences, `row_order.lane_sum` of them, one division (or
one logarithm), one rounding. Results of 16 bits are made of a shorter exp, whose error of 4e-6 is
far below theirs, and of a product with the reciprocal of the sum in place of a division. So softmax
of `dtype=torch.float32` has the bits of softmax of the input in fp32, whatever the input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.ops.contract import Case, Draw, Op
from batch_invariant.ops.dims import normalize
from batch_invariant.ops.probe import EXPONENTIALS, at_base, row_probe
from batch_invariant.ops.reduce_cases import sum_bound
from batch_invariant.ops.variant import tokens


def softmax(self: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """exp(self) / sum(exp(self)) along `dim`, as `torch.softmax`; `dtype` casts the input first."""
    out: torch.Tensor = torch.ops.batch_invariant.softmax.default(self, dim, dtype)
    return out


def log_softmax(self: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """log(softmax(self)) along `dim`, as `torch.log_softmax`; `dtype` casts the input first."""
    out: torch.Tensor = torch.ops.batch_invariant.log_softmax.default(self, dim, dtype)
    return out


def _fake(self: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
    out = check_softmax(self, dim, dtype)
    return torch.empty_like(self, dtype=out, memory_format=torch.contiguous_format)


def check_softmax(self: torch.Tensor, dim: int, dtype: torch.dtype | None) -> torch.dtype:
    """The result's dtype; raises if there is no such dimension, or the dtype is not floating."""
    normalize(dim, self.dim())
    out = dtype or self.dtype
    if not out.is_floating_point:
        raise RuntimeError(f"softmax: expected a floating point dtype, got {out}")
    return out


def check_softmax_backward(grad_output: torch.Tensor, output: torch.Tensor, dim: int) -> None:
    """Raises unless the two have one shape, which has such a dimension, and one dtype."""
    torch._check(
        grad_output.shape == output.shape and grad_output.dtype == output.dtype,
        lambda: (
            f"softmax_backward: grad_output {grad_output.dtype}{list(grad_output.shape)} and "
            f"output {output.dtype}{list(output.shape)} must have one shape and one dtype"
        ),
    )
    normalize(dim, output.dim())


def _fake_backward(grad: torch.Tensor, output: torch.Tensor, dim: int, input_dtype: Any) -> Any:
    check_softmax_backward(grad, output, dim)
    return torch.empty_like(grad, dtype=input_dtype, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.dim = inputs[1]
    ctx.input_dtype = inputs[0].dtype


def _back(name: str) -> Callable[..., Any]:
    def back(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        derivative = getattr(torch.ops.batch_invariant, name).default
        grad_input = derivative(grad, output, ctx.dim, output.dtype)
        return grad_input.to(ctx.input_dtype), None, None

    return back


def _half_to_float(kernel: Any, self: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    out: torch.Tensor = kernel(self, dim, torch.float32 if half_to_float else None)
    return out


def _safe_softmax(kernel: Any, self: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
    out: torch.Tensor = kernel(self, dim, dtype)
    masked = (self == -torch.inf).all(dim, keepdim=True)
    return out.masked_fill(masked, 0.0)


def _softmax_derivative(g: torch.Tensor, y: torch.Tensor, dim: int, dtype: Any) -> torch.Tensor:
    return ((g - (g * y).sum(dim, keepdim=True)) * y).to(dtype or g.dtype)


def _log_softmax_derivative(g: torch.Tensor, y: torch.Tensor, dim: int, dtype: Any) -> torch.Tensor:
    return (g - y.exp() * g.sum(dim, keepdim=True)).to(dtype or g.dtype)


def _bound_softmax(self: torch.Tensor, dim: int, dtype: torch.dtype, **_: Any) -> torch.Tensor:
    exact = self.softmax(dim)
    # The argument of exp is exact to half a unit of the spread of the row.
    spread = (self.amax(dim, keepdim=True) - self).clamp(max=110)
    return sum_bound(exact * (1 + spread), exact, self.size(dim) + 8, dtype)


def _bound_log_softmax(self: torch.Tensor, dim: int, dtype: torch.dtype, **_: Any) -> torch.Tensor:
    exact = self.log_softmax(dim)
    return sum_bound(exact.abs() + 1, exact, self.size(dim) + 8, dtype)


def _bound_backward(log: bool) -> Callable[..., torch.Tensor]:
    def bound(
        grad_output: torch.Tensor, output: torch.Tensor, dim: int, dtype: torch.dtype, **_: Any
    ) -> torch.Tensor:
        derivative = _log_softmax_derivative if log else _softmax_derivative
        exact = derivative(grad_output, output, dim, torch.float64)
        weight = output.exp() if log else output.abs()
        terms = grad_output.abs() * (1 if log else output.abs())
        magnitude = grad_output.abs() + weight * terms.sum(dim, keepdim=True)
        return sum_bound(magnitude, exact, output.size(dim) + 8, dtype)

    return bound


def _case(n: int, dtype: torch.dtype | None = None) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {"self": draw.rows(rows, n), "dim": -1, "dtype": dtype}

    return Case(f"{n}" + (f" to {dtype}" if dtype else ""), args)


def _case_middle(a: int, b: int) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {"self": draw.rows(rows, b, a).mT, "dim": 1, "dtype": None}

    return Case(f"{a}x{b} over dim 1, strided", args)


def _case_backward(n: int, log: bool) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        # Of the size of a softmax, and the same bits on every machine, which exp would not give.
        size = draw.normal(rows, n).abs()
        return {
            "grad_output": draw.rows(rows, n),
            "output": (-4 * size if log else size / n).to(draw.dtype),
            "dim": -1,
            "input_dtype": draw.dtype,
        }

    return Case(f"{n}", args)


_PROBE = row_probe(
    arguments={"dim": -1, "dtype": None},
    read=lambda outputs, values, site: at_base(outputs[0], values, site),
    sum_of="the denominator",
    **EXPONENTIALS,
)
_CASES = (_case(1024), _case(4099), _case(20011), _case(1030, torch.float32), _case_middle(1025, 3))
_BACKWARD = "(Tensor grad_output, Tensor output, int dim, ScalarType input_dtype) -> Tensor"

OPS = (
    Op(
        name="softmax",
        schema="(Tensor self, int dim, ScalarType? dtype) -> Tensor",
        fake=_fake,
        reference=torch.softmax,
        cases=_CASES,
        batch_axes={"self": 0},
        schedule=tokens,
        any_size=lambda n=2100: _case(n),
        error_bound=_bound_softmax,
        probe=_PROBE,
        aten={"_softmax": _half_to_float, "_safe_softmax": _safe_softmax},
        setup_context=_save,
        backward=_back("softmax_backward"),
    ),
    Op(
        name="log_softmax",
        schema="(Tensor self, int dim, ScalarType? dtype) -> Tensor",
        fake=_fake,
        reference=torch.log_softmax,
        cases=_CASES,
        batch_axes={"self": 0},
        schedule=tokens,
        any_size=lambda n=2100: _case(n),
        error_bound=_bound_log_softmax,
        probe=_PROBE,
        aten={"_log_softmax": _half_to_float},
        setup_context=_save,
        backward=_back("log_softmax_backward"),
    ),
    Op(
        name="softmax_backward",
        schema=_BACKWARD,
        fake=_fake_backward,
        reference=_softmax_derivative,
        cases=(_case_backward(1024, False), _case_backward(4099, False)),
        batch_axes={"grad_output": 0, "output": 0},
        schedule=tokens,
        any_size=lambda n=2100: _case_backward(n, False),
        error_bound=_bound_backward(log=False),
        aten={"_softmax_backward_data": None},
    ),
    Op(
        name="log_softmax_backward",
        schema=_BACKWARD,
        fake=_fake_backward,
        reference=_log_softmax_derivative,
        cases=(_case_backward(1024, True), _case_backward(4099, True)),
        batch_axes={"grad_output": 0, "output": 0},
        schedule=tokens,
        any_size=lambda n=2100: _case_backward(n, True),
        error_bound=_bound_backward(log=True),
        aten={"_log_softmax_backward_data": None},
    ),
)
