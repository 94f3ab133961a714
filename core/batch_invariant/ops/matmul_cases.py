"""Matrix products for the proof kit: error bounds, calls to try."""

from __future__ import annotations

from typing import Any

import torch

from batch_invariant.ops.contract import Case, Draw


def product_bound(
    a: torch.Tensor, b: torch.Tensor, addend: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """|error| <= K u32 (|a| @ |b|) for any order of K fp32 additions, plus one rounding."""
    magnitude = torch.matmul(a.abs(), b.abs())
    exact = torch.matmul(a, b)
    if addend is not None:
        magnitude = magnitude + addend.abs()
        exact = exact + addend
    unit = torch.finfo(dtype).eps / 2
    accumulate = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    terms = a.size(-1) + 2
    return (
        accumulate * terms * magnitude
        + unit * (exact.abs() + accumulate * terms * magnitude)
        + torch.finfo(dtype).tiny
    )


def case_mm(k: int, n: int) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {"self": draw.rows(rows, k), "mat2": draw.shared(n, k).mT}

    return Case(f"{k}x{n}", args)


def case_mm_rows(k: int, n: int) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {"self": draw.rows(rows, k), "mat2": draw.shared(n, k).mT.contiguous()}

    return Case(f"{k}x{n} row-major", args)


def case_addmm(k: int, n: int) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {
            "self": draw.shared(n),
            "mat1": draw.rows(rows, k),
            "mat2": draw.shared(n, k).mT,
        }

    return Case(f"{k}x{n}", args)


def case_bmm(m: int, k: int, n: int) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {"self": draw.rows(rows, m, k), "mat2": draw.rows(rows, n, k).mT}

    return Case(f"{m}x{k}x{n}", args)


def case_baddbmm(m: int, k: int, n: int) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {
            "self": draw.rows(rows, m, n),
            "batch1": draw.rows(rows, m, k),
            "batch2": draw.rows(rows, n, k).mT,
        }

    return Case(f"{m}x{k}x{n}", args)


def case_linear(k: int, n: int, bias: bool) -> Case:
    def args(draw: Draw, rows: int) -> dict[str, Any]:
        return {
            "input": draw.rows(rows, k),
            "weight": draw.shared(n, k),
            "bias": draw.shared(n) if bias else None,
        }

    return Case(f"{k}x{n}" + (" bias" if bias else ""), args)


def no_addend(values: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=values.dtype)
