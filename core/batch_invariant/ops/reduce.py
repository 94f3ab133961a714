"""Contracts of the reductions: sum, mean, prod, var, std, norm (linalg_vector_norm), logsumexp.

Order: `row_order.lane_sum` over the reduced elements, taken in row-major order, accumulated in
fp32 (float64 for float64). Integers and bools are exact in any order and use torch's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from batch_invariant.ops.contract import Op
from batch_invariant.ops.dims import Dims, normalize, reduced_shape
from batch_invariant.ops.probe import EXPONENTIALS, SQUARES, column_sums, row_probe
from batch_invariant.ops.reduce_cases import (
    bound_logsumexp,
    bound_mean,
    bound_norm,
    bound_prod,
    bound_std,
    bound_sum,
    bound_var,
    case_factors,
    case_row,
    shapes,
)
from batch_invariant.ops.variant import tokens


def sum(
    self: torch.Tensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The sum over `dim` (None: over everything), as `torch.sum`.

    fp32 lane sum, rounded once to `dtype` or the input's dtype; integers give int64.
    """
    out: torch.Tensor = torch.ops.batch_invariant.sum.default(self, dim, keepdim, dtype=dtype)
    return out


def mean(
    self: torch.Tensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The mean over `dim`, as `torch.mean`: fp32 lane sum, divided by n, rounded once."""
    out: torch.Tensor = torch.ops.batch_invariant.mean.default(self, dim, keepdim, dtype=dtype)
    return out


def prod(
    self: torch.Tensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The product over `dim`, as `torch.prod`, in the order of a lane sum with factors."""
    out: torch.Tensor = torch.ops.batch_invariant.prod.default(self, dim, keepdim, dtype=dtype)
    return out


def var(
    self: torch.Tensor, dim: Dims = None, *, correction: float = 1, keepdim: bool = False
) -> torch.Tensor:
    """The variance over `dim`, as `torch.var`.

    Two passes: the fp32 mean m, then the lane sum of the rounded squares (x - m)^2, divided by
    max(0, n - correction).
    """
    out: torch.Tensor = torch.ops.batch_invariant.var.default(
        self, dim, correction=correction, keepdim=keepdim
    )
    return out


def std(
    self: torch.Tensor, dim: Dims = None, *, correction: float = 1, keepdim: bool = False
) -> torch.Tensor:
    """The standard deviation over `dim`: the correctly rounded root of the fp32 variance."""
    out: torch.Tensor = torch.ops.batch_invariant.std.default(
        self, dim, correction=correction, keepdim=keepdim
    )
    return out


def norm(
    self: torch.Tensor,
    ord: float = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The vector norm of any order over `dim`, as `torch.linalg.vector_norm`.

    ord 2: root of the lane sum of rounded squares; 1: lane sum of magnitudes; 0: count of
    non-zeros; inf, -inf: exact; others: by powers.
    """
    out: torch.Tensor = torch.ops.batch_invariant.norm.default(self, ord, dim, keepdim, dtype=dtype)
    return out


def logsumexp(self: torch.Tensor, dim: Dims, keepdim: bool = False) -> torch.Tensor:
    """log(sum(exp(self))) over `dim`: the exact maximum plus the log of the lane sum of exp."""
    out: torch.Tensor = torch.ops.batch_invariant.logsumexp.default(self, dim, keepdim)
    return out


def result_dtype(x: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Output dtype of sum and prod."""
    if dtype is not None:
        return dtype
    return x.dtype if x.dtype.is_floating_point or x.dtype.is_complex else torch.int64


def _fake_sum(
    self: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> torch.Tensor:
    dims = normalize(dim, self.dim())
    return self.new_empty(reduced_shape(self.shape, dims, keepdim), dtype=result_dtype(self, dtype))


def _fake_mean(
    self: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> torch.Tensor:
    out = dtype or self.dtype
    if not out.is_floating_point and not out.is_complex:
        raise RuntimeError(
            f"mean: the input dtype is {self.dtype}; expected a floating point dtype, "
            "in the tensor or in the dtype argument"
        )
    dims = normalize(dim, self.dim())
    return self.new_empty(reduced_shape(self.shape, dims, keepdim), dtype=out)


def _fake_prod(
    self: torch.Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None
) -> torch.Tensor:
    return _fake_sum(self, dim, keepdim, dtype=dtype)


def _fake_var(
    self: torch.Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> torch.Tensor:
    check_floating("var", self)
    dims = normalize(dim, self.dim())
    return self.new_empty(reduced_shape(self.shape, dims, keepdim))


def _fake_norm(
    self: torch.Tensor,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> torch.Tensor:
    check_floating("norm", self)
    dims = normalize(dim, self.dim())
    return self.new_empty(reduced_shape(self.shape, dims, keepdim), dtype=dtype or self.dtype)


def _fake_logsumexp(self: torch.Tensor, dim: Any, keepdim: bool = False) -> torch.Tensor:
    dims = normalize(dim, self.dim())
    out = self.dtype if self.dtype.is_floating_point else torch.get_default_dtype()
    return self.new_empty(reduced_shape(self.shape, dims, keepdim), dtype=out)


def check_floating(name: str, x: torch.Tensor) -> None:
    """Raises unless x is of a real floating point dtype."""
    if not x.dtype.is_floating_point:
        raise RuntimeError(f"{name}: expected a floating point tensor, got {x.dtype}")


def _spread(grad: torch.Tensor, shape: Sequence[int], dim: Any, keepdim: bool) -> torch.Tensor:
    """A reduced tensor put back against the dimensions that were reduced away."""
    dims = normalize(dim, len(shape))
    return grad if keepdim else grad.reshape(reduced_shape(shape, dims, True))


def _save_reduction(save_output: bool) -> Callable[..., None]:
    def save(
        ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
    ) -> None:
        self = inputs[0]
        ctx.save_for_backward(self, *((output,) if save_output else ()))
        ctx.inputs = inputs[1:]
        ctx.keywords = keyword_only_inputs

    return save


def _none(ctx: Any) -> tuple[None, ...]:
    return (None,) * len(ctx.inputs)


def _back_sum(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    dim, keepdim = ctx.inputs
    return (_spread(grad, x.shape, dim, keepdim).to(x.dtype).expand(x.shape), *_none(ctx))


def _back_mean(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    dim, keepdim = ctx.inputs
    n = x.numel() // max(grad.numel(), 1)
    return ((_spread(grad, x.shape, dim, keepdim) / n).to(x.dtype).expand(x.shape), *_none(ctx))


def _back_prod(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, out = ctx.saved_tensors
    dim, keepdim = ctx.inputs
    zero = x == 0
    zeros = zero.sum(normalize(dim, x.dim()), keepdim=True) if x.dim() else zero.long()
    rest = _spread(prod(torch.where(zero, 1, x), dim, keepdim), x.shape, dim, keepdim)
    others = torch.where(zeros == 0, _spread(out, x.shape, dim, keepdim) / x, 0)
    others = torch.where((zeros == 1) & zero, rest, others)
    return (_spread(grad, x.shape, dim, keepdim) * others, *_none(ctx))


def _centered(x: torch.Tensor, dim: Any) -> torch.Tensor:
    return x - mean(x, dim, True)


def _degrees(ctx: Any, x: torch.Tensor, out: torch.Tensor) -> float:
    correction = ctx.keywords["correction"]
    n = x.numel() // max(out.numel(), 1)
    return max(0.0, n - (1 if correction is None else correction))


def _back_var(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, out = ctx.saved_tensors
    (dim,) = ctx.inputs
    scale = torch.full((), 2.0, dtype=x.dtype) / _degrees(ctx, x, out)
    g = _spread(grad, x.shape, dim, ctx.keywords["keepdim"])
    return (g * scale * _centered(x, dim), None)


def _back_std(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, out = ctx.saved_tensors
    (dim,) = ctx.inputs
    keepdim = ctx.keywords["keepdim"]
    g = _spread(grad / (out * _degrees(ctx, x, out)), x.shape, dim, keepdim)
    zero = _spread(out == 0, x.shape, dim, keepdim)
    return (torch.where(zero, 0, g * _centered(x, dim)), None)


def _back_norm(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, out = ctx.saved_tensors
    p, dim, keepdim = ctx.inputs
    g = _spread(grad, x.shape, dim, keepdim)
    n = _spread(out, x.shape, dim, keepdim)
    if p == 0:
        gx = torch.zeros_like(x)
    elif p == 1:
        gx = g * x.sgn()
    elif p == 2:
        gx = torch.where(n == 0, 0, g * (x / n))
    elif abs(p) == float("inf"):
        equal = (x.abs() == n).to(x.dtype)
        gx = g * x.sgn() * equal / sum(equal, dim, True)
    else:
        gx = torch.where(n == 0, 0, g * x.sgn() * (x.abs() / n).pow(p - 1))
    return (gx.to(x.dtype), *_none(ctx))


def _save_logsumexp(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.inputs = inputs[1:]


def _back_logsumexp(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, out = ctx.saved_tensors
    dim, keepdim = ctx.inputs
    lse = _spread(out, x.shape, dim, keepdim)
    shifted = torch.where(lse.isinf(), x, x - lse)
    return (_spread(grad, x.shape, dim, keepdim) * shifted.exp(), *_none(ctx))


def _sum_all(kernel: Any, self: torch.Tensor, *, dtype: Any = None) -> torch.Tensor:
    out: torch.Tensor = kernel(self, None, False, dtype=dtype)
    return out


def _foreach_norm(kernel: Any, self: list[torch.Tensor], ord: Any = 2, dtype: Any = None) -> Any:
    return [kernel(x, ord, None, False, dtype=dtype) for x in self]


def _norm_dims(
    kernel: Any,
    self: torch.Tensor,
    p: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> torch.Tensor:
    out: torch.Tensor = kernel(self, 2 if p is None else p, dim, keepdim, dtype=dtype)
    return out


def _with_mean(
    kernel: Any,
    self: torch.Tensor,
    dim: Any = None,
    *,
    correction: Any = None,
    keepdim: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    out: torch.Tensor = kernel(self, dim, correction=correction, keepdim=keepdim)
    return out, mean(self, dim, keepdim)


_WIDE = {"dtype": torch.float32}
_FULL = "Tensor self, int[1]? dim, bool keepdim"

OPS = (
    Op(
        name="sum",
        schema=f"({_FULL}, *, ScalarType? dtype=None) -> Tensor",
        fake=_fake_sum,
        reference=torch.sum,
        cases=shapes(),
        batch_axes={"self": 0},
        schedule=tokens,
        any_size=lambda n=2100: case_row(n),
        error_bound=bound_sum,
        probe=row_probe(wide=_WIDE, layouts=column_sums(wide=_WIDE)),
        aten={"sum": _sum_all, "sum.dim_IntList": None},
        setup_context=_save_reduction(save_output=False),
        backward=_back_sum,
    ),
    Op(
        name="mean",
        schema=f"({_FULL}, *, ScalarType? dtype=None) -> Tensor",
        fake=_fake_mean,
        reference=torch.mean,
        cases=shapes(),
        batch_axes={"self": 0},
        schedule=tokens,
        any_size=lambda n=2100: case_row(n),
        error_bound=bound_mean,
        probe=row_probe(divided=True, wide=_WIDE),
        aten={"mean": _sum_all, "mean.dim": None},
        setup_context=_save_reduction(save_output=False),
        backward=_back_mean,
    ),
    Op(
        name="prod",
        schema=("(Tensor self, int? dim, bool keepdim, *, ScalarType? dtype=None) -> Tensor"),
        fake=_fake_prod,
        reference=torch.prod,
        cases=(case_factors(1024), case_factors(4099)),
        batch_axes={"self": 0},
        schedule=tokens,
        any_size=lambda n=2100: case_factors(n),
        error_bound=bound_prod,
        aten={"prod": _sum_all, "prod.dim_int": None},
        setup_context=_save_reduction(save_output=True),
        backward=_back_prod,
    ),
    Op(
        name="var",
        schema=(
            "(Tensor self, int[1]? dim, *, Scalar? correction=None, bool keepdim=False) -> Tensor"
        ),
        fake=_fake_var,
        reference=torch.var,
        cases=shapes(),
        batch_axes={"self": 0},
        schedule=tokens,
        any_size=lambda n=2100: case_row(n + 1),
        error_bound=bound_var,
        aten={"var.correction": None, "var_mean.correction": _with_mean},
        setup_context=_save_reduction(save_output=True),
        backward=_back_var,
    ),
    Op(
        name="std",
        schema=(
            "(Tensor self, int[1]? dim, *, Scalar? correction=None, bool keepdim=False) -> Tensor"
        ),
        fake=_fake_var,
        reference=torch.std,
        cases=shapes(),
        batch_axes={"self": 0},
        schedule=tokens,
        any_size=lambda n=2100: case_row(n + 1),
        error_bound=bound_std,
        aten={"std.correction": None, "std_mean.correction": _with_mean},
        setup_context=_save_reduction(save_output=True),
        backward=_back_std,
    ),
    Op(
        name="norm",
        schema=(
            "(Tensor self, Scalar ord, int[1]? dim, bool keepdim, *,"
            " ScalarType? dtype=None) -> Tensor"
        ),
        fake=_fake_norm,
        reference=torch.linalg.vector_norm,
        cases=shapes(ord=2),
        batch_axes={"self": 0},
        schedule=tokens,
        any_size=lambda n=2100: case_row(n, ord=2),
        error_bound=bound_norm,
        probe=row_probe(
            arguments={"ord": 2, "dim": -1, "keepdim": False},
            sum_of="the squares of a row",
            **SQUARES,
        ),
        aten={
            "linalg_vector_norm": None,
            "_foreach_norm.Scalar": _foreach_norm,
            "norm.Scalar": _norm_dims,
            "norm.ScalarOpt_dim": _norm_dims,
            "norm.ScalarOpt_dtype": _norm_dims,
            "norm.ScalarOpt_dim_dtype": _norm_dims,
        },
        setup_context=_save_reduction(save_output=True),
        backward=_back_norm,
    ),
    Op(
        name="logsumexp",
        schema="(Tensor self, int[1] dim, bool keepdim) -> Tensor",
        fake=_fake_logsumexp,
        reference=torch.logsumexp,
        cases=shapes(),
        batch_axes={"self": 0},
        schedule=tokens,
        any_size=lambda n=2100: case_row(n),
        error_bound=bound_logsumexp,
        probe=row_probe(sum_of="exp of a row", **EXPONENTIALS),
        aten={"logsumexp": None},
        setup_context=_save_logsumexp,
        backward=_back_logsumexp,
    ),
)
