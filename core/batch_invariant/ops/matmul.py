"""Contracts of the matrix products: mm, addmm, bmm, baddbmm, linear; matmul is made of them.

Order: fp32 accumulation over k in an order that is a function of (K, N, dtype) alone; addend and
bias are added in fp32 before the one rounding at the end. fp32 inputs use true fp32, unless the
user asks for less by torch's own switches; float64 inputs float64. `PORTABLE` is the order of fp32
inputs in every kernel that is portable.
"""

from __future__ import annotations

from typing import Any

import torch

from batch_invariant.ops.contract import Op
from batch_invariant.ops.matmul_cases import (
    case_addmm,
    case_baddbmm,
    case_bmm,
    case_linear,
    case_mm,
    case_mm_rows,
    no_addend,
    product_bound,
)
from batch_invariant.ops.probe import column_probe
from batch_invariant.ops.variant import rows_only, tokens
from batch_invariant.order import by_size, chunked, serial

CHUNK = 512
"""k of one chain of a portable fp32 product, where there are several."""

CHUNKED_FROM = 2048
"""The least K that is cut: a longer chain would keep few rows from using all of a GPU."""

PORTABLE = by_size(CHUNKED_FROM, serial(), chunked(CHUNK, serial()))
"""One chain of fused multiply-adds over ascending k, or one for each chunk, added ascending."""


def portable_chunk(k: int) -> int:
    """The k of one chain of a portable fp32 product; 0 means one chain over all of it."""
    return CHUNK if k >= CHUNKED_FROM else 0


def mm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    """`self @ mat2` for two matrices.

    self: [M, K], mat2: [K, N], of one floating dtype; returns [M, N] in that dtype.
    """
    out: torch.Tensor = torch.ops.batch_invariant.mm.default(self, mat2)
    return out


def addmm(
    self: torch.Tensor,
    mat1: torch.Tensor,
    mat2: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    """`beta * self + alpha * (mat1 @ mat2)`, rounded once.

    mat1: [M, K], mat2: [K, N], self: broadcastable to [M, N]; returns [M, N]. With `beta == 0`,
    `self` is not read.
    """
    out: torch.Tensor = torch.ops.batch_invariant.addmm.default(
        self, mat1, mat2, beta=beta, alpha=alpha
    )
    return out


def bmm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    """`self[b] @ mat2[b]` for every b.

    self: [B, M, K], mat2: [B, K, N]; returns [B, M, N].
    """
    out: torch.Tensor = torch.ops.batch_invariant.bmm.default(self, mat2)
    return out


def baddbmm(
    self: torch.Tensor,
    batch1: torch.Tensor,
    batch2: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    """`beta * self + alpha * (batch1 @ batch2)`, rounded once.

    batch1: [B, M, K], batch2: [B, K, N], self: broadcastable to [B, M, N].
    """
    out: torch.Tensor = torch.ops.batch_invariant.baddbmm.default(
        self, batch1, batch2, beta=beta, alpha=alpha
    )
    return out


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`input @ weight.T + bias`, rounded once.

    input: [..., K], weight: [N, K] or [K], bias: [N] or a scalar; returns [..., N].
    """
    out: torch.Tensor = torch.ops.batch_invariant.linear.default(input, weight, bias)
    return out


def matmul(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`torch.matmul` for every pair of ranks, with broadcasting of the batch dimensions.

    Vectors count as one row or one column; the result has the bits of the corresponding `mm` or
    `bmm`, whichever of them is used.
    """
    if self.dim() == 0 or other.dim() == 0:
        raise RuntimeError(
            "both arguments to matmul need to be at least 1D, but they are "
            f"{self.dim()}D and {other.dim()}D"
        )
    left = self.unsqueeze(0) if self.dim() == 1 else self
    right = other.unsqueeze(-1) if other.dim() == 1 else other
    if left.size(-1) != right.size(-2):
        raise RuntimeError(
            f"matmul: the inner sizes of {list(self.shape)} and {list(other.shape)} differ"
        )
    if right.dim() == 2:
        out = mm(left.reshape(-1, left.size(-1)), right)
        out = out.view(*left.shape[:-1], right.size(-1))
    else:
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        a = left.expand(*batch, *left.shape[-2:]).flatten(0, -3)
        b = right.expand(*batch, *right.shape[-2:]).flatten(0, -3)
        out = bmm(a, b).view(*batch, left.size(-2), right.size(-1))
    if self.dim() == 1:
        out = out.squeeze(-2)
    if other.dim() == 1:
        out = out.squeeze(-1)
    return out


def _same_dtype(name: str, *tensors: torch.Tensor | None) -> None:
    dtypes = [t.dtype for t in tensors if t is not None]
    if any(d != dtypes[0] for d in dtypes):
        raise RuntimeError(
            f"{name}: expected tensors of one dtype, got {', '.join(map(str, dtypes))}"
        )


def _check_mm(name: str, a: torch.Tensor, b: torch.Tensor, rank: int) -> None:
    if a.dim() != rank or b.dim() != rank:
        raise RuntimeError(
            f"{name}: expected two {rank}-D tensors, got {list(a.shape)} and {list(b.shape)}"
        )
    torch._check(
        a.size(-1) == b.size(-2) and (rank == 2 or a.size(0) == b.size(0)),
        lambda: f"{name}: shapes {list(a.shape)} and {list(b.shape)} cannot be multiplied",
    )
    _same_dtype(name, a, b)


def check_addend(name: str, addend: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The addend expanded to the product's shape; a clear error where it cannot be."""
    try:
        return addend.expand(shape)
    except RuntimeError:
        raise RuntimeError(
            f"{name}: the addend of shape {list(addend.shape)} does not broadcast to {list(shape)}"
        ) from None


def check_mm(self: torch.Tensor, mat2: torch.Tensor, addend: torch.Tensor | None = None) -> None:
    """Raises unless they are matrices that can be multiplied; addend and all of one dtype."""
    _check_mm("mm", self, mat2, 2)
    _same_dtype("addmm", self, addend)


def check_bmm(self: torch.Tensor, mat2: torch.Tensor, addend: torch.Tensor | None = None) -> None:
    """Raises unless they are batches of matrices that can be multiplied; all of one dtype."""
    _check_mm("bmm", self, mat2, 3)
    _same_dtype("baddbmm", self, addend)


def check_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raises unless input, weight and bias fit together as torch requires."""
    if input.dim() == 0 or weight.dim() not in (1, 2):
        raise RuntimeError(
            "linear: expected input [..., K] and weight [N, K] or [K], got "
            f"{list(input.shape)} and {list(weight.shape)}"
        )
    if weight.dim() == 1 and bias is not None and bias.dim() != 0:
        raise RuntimeError(
            f"linear: a 1-D weight takes a 0-D bias, got a bias of shape {list(bias.shape)}"
        )
    torch._check(
        input.size(-1) == weight.size(-1),
        lambda: f"linear: input {list(input.shape)} and weight {list(weight.shape)} differ in K",
    )
    _same_dtype("linear", input, weight, bias)
    if bias is not None:
        check_addend("linear", bias, (*input.shape[:-1], *weight.shape[:-1]))


def _fake_mm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    check_mm(self, mat2)
    return self.new_empty(self.size(0), mat2.size(1))


def _fake_addmm(
    self: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, *, beta: Any = 1, alpha: Any = 1
) -> torch.Tensor:
    check_mm(mat1, mat2, self)
    check_addend("addmm", self, (mat1.size(0), mat2.size(1)))
    return mat1.new_empty(mat1.size(0), mat2.size(1))


def _fake_bmm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    check_bmm(self, mat2)
    return self.new_empty(self.size(0), self.size(1), mat2.size(2))


def _fake_baddbmm(
    self: torch.Tensor,
    batch1: torch.Tensor,
    batch2: torch.Tensor,
    *,
    beta: Any = 1,
    alpha: Any = 1,
) -> torch.Tensor:
    check_bmm(batch1, batch2, self)
    check_addend("baddbmm", self, (batch1.size(0), batch1.size(1), batch2.size(2)))
    return _fake_bmm(batch1, batch2)


def _fake_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    check_linear(input, weight, bias)
    return input.new_empty(*input.shape[:-1], *weight.shape[:-1])


def _save_mm(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _back_mm(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    a, b = ctx.saved_tensors
    return (
        mm(grad, b.mT) if ctx.needs_input_grad[0] else None,
        mm(a.mT, grad) if ctx.needs_input_grad[1] else None,
    )


def _back_bmm(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    a, b = ctx.saved_tensors
    return (
        bmm(grad, b.mT) if ctx.needs_input_grad[0] else None,
        bmm(a.mT, grad) if ctx.needs_input_grad[1] else None,
    )


def _save_addmm(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: torch.Tensor
) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.addend_shape = inputs[0].shape
    ctx.beta = keyword_only_inputs["beta"]
    ctx.alpha = keyword_only_inputs["alpha"]


def _sum_to(grad: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Undoes broadcasting: sums the gradient over the dimensions that were expanded."""
    from batch_invariant.ops.reduce import sum

    lead = grad.dim() - len(shape)
    dims = [d for d in range(grad.dim()) if d < lead or (shape[d - lead] == 1 != grad.size(d))]
    return sum(grad, dims, keepdim=True).view(shape) if dims else grad


def _back_addmm(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    a, b = ctx.saved_tensors
    product = mm if a.dim() == 2 else bmm
    scaled = grad if ctx.alpha == 1 else grad * ctx.alpha
    return (
        _sum_to(grad if ctx.beta == 1 else grad * ctx.beta, ctx.addend_shape)
        if ctx.needs_input_grad[0]
        else None,
        product(scaled, b.mT) if ctx.needs_input_grad[1] else None,
        product(a.mT, scaled) if ctx.needs_input_grad[2] else None,
    )


def _back_linear(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    input, weight, bias = ctx.saved_tensors
    matrix = weight if weight.dim() == 2 else weight.unsqueeze(0)
    g = grad.reshape(-1, matrix.size(0))
    x = input.reshape(-1, input.size(-1))
    return (
        mm(g, matrix).view(input.shape) if ctx.needs_input_grad[0] else None,
        mm(g.mT, x).view(weight.shape) if ctx.needs_input_grad[1] else None,
        _sum_to(g, torch.Size((matrix.size(0),))).view(bias.shape)
        if ctx.needs_input_grad[2]
        else None,
    )


def _linear(
    kernel: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    out: torch.Tensor = kernel(input, weight, bias)
    return out


def _mv(kernel: Any, self: torch.Tensor, vec: torch.Tensor) -> torch.Tensor:
    if self.dim() != 2 or vec.dim() != 1:
        raise RuntimeError(
            f"mv: expected [M, K] and [K], got {list(self.shape)} and {list(vec.shape)}"
        )
    out: torch.Tensor = kernel(self, vec.unsqueeze(1))
    return out.squeeze(1)


def _dot(kernel: Any, self: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    if self.dim() != 1 or tensor.dim() != 1 or self.numel() != tensor.numel():
        raise RuntimeError(
            "dot: expected two 1-D tensors of one size, got "
            f"{list(self.shape)} and {list(tensor.shape)}"
        )
    out: torch.Tensor = kernel(self.unsqueeze(0), tensor.unsqueeze(1))
    return out.view(())


def _addmv(
    kernel: Any,
    self: torch.Tensor,
    mat: torch.Tensor,
    vec: torch.Tensor,
    *,
    beta: Any = 1,
    alpha: Any = 1,
) -> torch.Tensor:
    addend = check_addend("addmv", self, (mat.size(0),))
    out: torch.Tensor = kernel(addend.unsqueeze(1), mat, vec.unsqueeze(1), beta=beta, alpha=alpha)
    return out.squeeze(1)


OPS = (
    Op(
        name="mm",
        schema="(Tensor self, Tensor mat2) -> Tensor",
        fake=_fake_mm,
        reference=torch.mm,
        cases=(case_mm(1024, 512), case_mm(4096, 129), case_mm(1031, 67), case_mm_rows(2048, 256)),
        batch_axes={"self": 0},
        schedule=rows_only,
        any_size=lambda k=1100, n=70: case_mm(k, n),
        error_bound=lambda self, mat2, dtype: product_bound(self, mat2, None, dtype),
        probe=column_probe("self", "mat2", transposed=False, batched=False),
        aten={"mm": None, "mv": _mv, "dot": _dot, "vdot": _dot},
        setup_context=_save_mm,
        backward=_back_mm,
    ),
    Op(
        name="addmm",
        schema=(
            "(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1) -> Tensor"
        ),
        fake=_fake_addmm,
        reference=torch.addmm,
        cases=(case_addmm(1024, 512), case_addmm(1031, 67)),
        batch_axes={"mat1": 0},
        schedule=rows_only,
        any_size=lambda k=1100, n=70: case_addmm(k, n),
        error_bound=lambda self, mat1, mat2, dtype: product_bound(mat1, mat2, self, dtype),
        probe=column_probe(
            "mat1", "mat2", transposed=False, batched=False, arguments={"self": no_addend}
        ),
        aten={"addmm": None, "addmv": _addmv},
        setup_context=_save_addmm,
        backward=_back_addmm,
    ),
    Op(
        name="bmm",
        schema="(Tensor self, Tensor mat2) -> Tensor",
        fake=_fake_bmm,
        reference=torch.bmm,
        cases=(case_bmm(3, 1024, 64), case_bmm(17, 100, 33), case_bmm(1, 64, 1500)),
        batch_axes={"self": 0, "mat2": 0},
        any_size=lambda m=5, k=1100, n=40: case_bmm(m, k, n),
        error_bound=lambda self, mat2, dtype: product_bound(self, mat2, None, dtype),
        probe=column_probe("self", "mat2", transposed=False, batched=True),
        aten={"bmm": None},
        setup_context=_save_mm,
        backward=_back_bmm,
    ),
    Op(
        name="baddbmm",
        schema=(
            "(Tensor self, Tensor batch1, Tensor batch2, *, Scalar beta=1, Scalar alpha=1)"
            " -> Tensor"
        ),
        fake=_fake_baddbmm,
        reference=torch.baddbmm,
        cases=(case_baddbmm(3, 1024, 64),),
        batch_axes={"self": 0, "batch1": 0, "batch2": 0},
        any_size=lambda m=5, k=1100, n=40: case_baddbmm(m, k, n),
        error_bound=lambda self, batch1, batch2, dtype: product_bound(batch1, batch2, self, dtype),
        probe=column_probe(
            "batch1", "batch2", transposed=False, batched=True, arguments={"self": no_addend}
        ),
        aten={"baddbmm": None},
        setup_context=_save_addmm,
        backward=_back_addmm,
    ),
    Op(
        name="linear",
        schema="(Tensor input, Tensor weight, Tensor? bias) -> Tensor",
        fake=_fake_linear,
        reference=torch.nn.functional.linear,
        cases=(
            case_linear(576, 1536, False),
            case_linear(4096, 129, True),
            case_linear(1031, 67, True),
        ),
        batch_axes={"input": 0},
        schedule=tokens,
        any_size=lambda k=1100, n=70: case_linear(k, n, True),
        error_bound=lambda input, weight, bias, dtype: product_bound(input, weight.mT, bias, dtype),
        probe=column_probe(
            "input",
            "weight",
            transposed=True,
            batched=False,
            arguments={"bias": lambda values: None},
        ),
        composite={"linear": _linear},
        setup_context=_save_mm,
        backward=_back_linear,
    ),
)
