"""Contracts of argmax and topk: exact selections with one rule for ties.

Rule: among equal values the lowest index comes first. NaN counts as the largest value, as in
torch. Nothing is added, so every order gives the same values; the rule fixes the indices.
"""

from __future__ import annotations

from typing import Any

import torch

from batch_invariant.ops.contract import Case, Draw, Op
from batch_invariant.ops.dims import normalize, reduced_shape
from batch_invariant.ops.variant import tokens


def argmax(self: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    """The index of the largest value along `dim` (None: in the flattened tensor), int64."""
    out: torch.Tensor = torch.ops.batch_invariant.argmax.default(self, dim, keepdim)
    return out


def topk(
    self: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest (or smallest) values along `dim` and their int64 indices, best first.

    The result is sorted whatever `sorted` says: an unsorted one would have no fixed order.
    """
    values, indices = torch.ops.batch_invariant.topk.default(self, k, dim, largest, sorted)
    return values, indices


def _fake_argmax(self: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    dims = normalize(dim, self.dim())
    return self.new_empty(reduced_shape(self.shape, dims, keepdim), dtype=torch.int64)


def topk_shape(self: torch.Tensor, k: int, dim: int) -> list[int]:
    """The output's shape; raises if k is out of range."""
    if self.dim() == 0:
        if k not in (0, 1):
            raise RuntimeError(f"topk: k must be 0 or 1 for a scalar, got {k}")
        return []
    (d,) = normalize(dim, self.dim())
    if not 0 <= k <= self.size(d):
        raise RuntimeError(f"topk: k must be in 0..{self.size(d)} for dim {dim}, got {k}")
    return [k if i == d else size for i, size in enumerate(self.shape)]


def _fake_topk(
    self: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = topk_shape(self, k, dim)
    return self.new_empty(shape), self.new_empty(shape, dtype=torch.int64)


def _ref_topk(
    self: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = self.sort(dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)


def _save_topk(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(output[1])
    ctx.shape, ctx.dim = inputs[0].shape, inputs[2]
    ctx.mark_non_differentiable(output[1])


def _back_topk(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    # Indices are distinct along dim, so scattering adds nothing together.
    return grad.new_zeros(ctx.shape).scatter(ctx.dim, indices, grad), None, None, None, None


def _ties(draw: Draw, rows: int, n: int) -> torch.Tensor:
    """Small whole numbers: many equal values in every row."""
    return torch.randint(-8, 8, (rows, n), generator=draw.generator).to(draw.dtype)


def _arguments(x: torch.Tensor) -> dict[str, Any]:
    return {"self": x, "dim": -1, "keepdim": False}


def _topk_arguments(x: torch.Tensor, k: int) -> dict[str, Any]:
    return {"self": x, "k": k, "dim": -1, "largest": True, "sorted": True}


OPS = (
    Op(
        name="argmax",
        schema="(Tensor self, int? dim, bool keepdim) -> Tensor",
        fake=_fake_argmax,
        reference=torch.argmax,
        cases=(
            Case("1024", lambda draw, rows: _arguments(draw.rows(rows, 1024))),
            Case("4099 ties", lambda draw, rows: _arguments(_ties(draw, rows, 4099))),
        ),
        batch_axes={"self": 0},
        schedule=tokens,
        any_size=lambda n=2100: Case(f"{n}", lambda draw, rows: _arguments(_ties(draw, rows, n))),
        aten={"argmax": None},
    ),
    Op(
        name="topk",
        schema=("(Tensor self, int k, int dim, bool largest, bool sorted) -> (Tensor, Tensor)"),
        fake=_fake_topk,
        reference=_ref_topk,
        cases=(
            Case("8 of 1024", lambda draw, rows: _topk_arguments(draw.rows(rows, 1024), 8)),
            Case(
                "50 of 4099 ties", lambda draw, rows: _topk_arguments(_ties(draw, rows, 4099), 50)
            ),
        ),
        batch_axes={"self": 0},
        out_axes=(0, 0),
        schedule=tokens,
        any_size=lambda k=20, more=2000: Case(
            f"{k} of {k + more}",
            lambda draw, rows: _topk_arguments(_ties(draw, rows, k + more), k),
        ),
        aten={"topk": None},
        setup_context=_save_topk,
        backward=_back_topk,
    ),
)
