"""Reductions for the proof kit: error bounds of sums, calls to try."""

from __future__ import annotations

from typing import Any

import torch

from batch_invariant.ops.contract import Case, Draw


def sum_bound(
    magnitude: torch.Tensor, exact: torch.Tensor, n: int, dtype: torch.dtype
) -> torch.Tensor:
    """|error| <= (n + 2) u32 sum|x| for any order of n fp32 additions, plus one rounding."""
    accumulate = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    unit = torch.finfo(dtype).eps / 2
    loose = accumulate * (n + 2) * magnitude
    return loose + unit * (exact.abs() + loose) + torch.finfo(dtype).tiny


def _reduced_elements(x: torch.Tensor, out: torch.Tensor) -> int:
    return x.numel() // max(out.numel(), 1)


def bound_sum(self: torch.Tensor, dim: Any, dtype: torch.dtype, **_: Any) -> torch.Tensor:
    exact = self.sum(dim)
    return sum_bound(self.abs().sum(dim), exact, _reduced_elements(self, exact), dtype)


def bound_mean(self: torch.Tensor, dim: Any, dtype: torch.dtype, **_: Any) -> torch.Tensor:
    exact = self.mean(dim)
    return sum_bound(self.abs().mean(dim), exact, _reduced_elements(self, exact) + 1, dtype)


def bound_prod(self: torch.Tensor, dim: Any, dtype: torch.dtype, **_: Any) -> torch.Tensor:
    exact = self.prod(dim)
    return sum_bound(exact.abs(), exact, _reduced_elements(self, exact), dtype)


def bound_var(self: torch.Tensor, dim: Any, dtype: torch.dtype, **_: Any) -> torch.Tensor:
    exact = self.var(dim, correction=1)
    n = _reduced_elements(self, exact)
    # The mean's own error enters squared and, through the centred sum, in first order.
    spread = self.abs().mean(dim).square() + exact
    return sum_bound(4 * spread, exact, n + 4, dtype)


def bound_std(self: torch.Tensor, dim: Any, dtype: torch.dtype, **_: Any) -> torch.Tensor:
    exact = self.std(dim, correction=1)
    return bound_var(self, dim, torch.float32) / exact + torch.finfo(dtype).eps * exact


def bound_norm(self: torch.Tensor, dim: Any, dtype: torch.dtype, **_: Any) -> torch.Tensor:
    exact = torch.linalg.vector_norm(self, dim=dim)
    return sum_bound(exact, exact, _reduced_elements(self, exact), dtype)


def bound_logsumexp(self: torch.Tensor, dim: Any, dtype: torch.dtype, **_: Any) -> torch.Tensor:
    exact = self.logsumexp(dim)
    n = _reduced_elements(self, exact)
    return sum_bound(self.amax(dim).abs() + 1, exact, n + 8, dtype)


def case_row(n: int, **arguments: Any) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {"self": draw.rows(rows, n), "dim": -1, "keepdim": False, **arguments}

    return Case(f"{n}", args)


def _case_middle(a: int, b: int, **arguments: Any) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {"self": draw.rows(rows, b, a).mT, "dim": 1, "keepdim": False, **arguments}

    return Case(f"{a}x{b} over dim 1, strided", args)


def _case_columns(n: int, **arguments: Any) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {"self": draw.rows(rows, n).mT.contiguous(), "dim": 0, "keepdim": False, **arguments}

    return Case(f"{n} over dim 0", args, batch_axes={"self": 1})


def _case_two(a: int, b: int, **arguments: Any) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {"self": draw.rows(rows, a, b), "dim": [1, 2], "keepdim": False, **arguments}

    return Case(f"{a}x{b} over two dims", args)


def case_factors(n: int) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        # Factors near one, so that a long product neither vanishes nor overflows.
        x = draw.normal(rows, n)
        return {"self": (1 + x / 64).to(draw.dtype), "dim": -1, "keepdim": False}

    return Case(f"{n}", args)


def shapes(**arguments: Any) -> tuple[Case, ...]:
    return (
        case_row(1024, **arguments),
        case_row(4099, **arguments),
        case_row(20011, **arguments),
        _case_middle(1025, 3, **arguments),
        _case_columns(1030, **arguments),
        _case_two(33, 65, **arguments),
    )
