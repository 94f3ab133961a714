"""A measured tree replayed on random data: does it give the bits of the operator?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from batch_invariant.order import Tree, fold
from batch_invariant.proof.order.masks import Sums

TRIALS = 16


@dataclass(frozen=True)
class Replay:
    """`equal` of `trials` sums have the bits of the tree.

    accumulator: the dtype in which the tree is added to have them all; None: none that was tried.
    wider: it is wider than a sum of such inputs needs.
    several: the tree has steps of more than two terms, whose rounding is the hardware's own.
    """

    equal: int
    trials: int
    accumulator: str | None
    wider: bool = False
    several: bool = False

    @property
    def refuted(self) -> bool:
        """Whether the tree cannot be all that there is to the sum."""
        return self.accumulator is None and not self.several

    def __str__(self) -> str:
        where = f" in {self.accumulator}" if self.accumulator else ""
        return f"{self.equal}/{self.trials}{where}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "equal": self.equal,
            "trials": self.trials,
            "accumulator": self.accumulator,
            "wider": self.wider,
            "several": self.several,
        }


def replay(
    tree: Tree, sums: Sums, n: int, dtype: torch.dtype, result: torch.dtype, divided: bool
) -> Replay:
    """Adds random terms in the order of the tree and compares the bits with those of `sums`.

    In fp32 (float64 for float64), and where that differs in float64. A step of several terms is
    added exactly and rounded once, which is what no hardware has to do.
    """
    terms = spread(TRIALS, n, dtype)
    found = sums(terms)
    several = fold(tree, lambda i: False, lambda parts: len(parts) > 2 or any(parts))
    best = 0
    for wide in dict.fromkeys((torch.promote_types(dtype, torch.float32), torch.float64)):
        total = torch.from_numpy(evaluate(tree, terms.to(wide).numpy()))
        expected = (total / n if divided else total).to(result)
        equal = int((found == expected).sum())
        best = max(best, equal)
        if equal == TRIALS:
            wider = torch.finfo(wide).bits > max(32, torch.finfo(dtype).bits)
            return Replay(equal, TRIALS, str(wide).removeprefix("torch."), wider, several)
    return Replay(best, TRIALS, None, several=several)


def evaluate(tree: Tree, terms: NDArray[Any]) -> NDArray[Any]:
    """The sums of the rows of `terms`, [trials, n], every step rounded to their dtype."""

    def node(parts: list[NDArray[Any]]) -> NDArray[Any]:
        if len(parts) == 2:
            added: NDArray[Any] = parts[0] + parts[1]
            return added
        exact = np.sum(np.stack(parts).astype(np.float64), axis=0)
        rounded: NDArray[Any] = exact.astype(terms.dtype)
        return rounded

    columns = np.ascontiguousarray(terms.T)
    return fold(tree, lambda i: columns[i], node)


def rounds_products(tree: Tree, sums: Sums, n: int, factors: torch.Tensor) -> bool | None:
    """Whether fp32 products are rounded before they are added; None: the bits fit neither.

    sums: multiplies the terms by the factors, [n].
    """
    terms = spread(TRIALS, n, torch.float32)
    found = sums(terms).numpy()
    exact = terms.double().numpy() * factors.double().numpy()
    if np.array_equal(found, evaluate(tree, exact.astype(np.float32))):
        return True
    return False if np.array_equal(found, _fused_products(tree, exact)) else None


def _fused_products(tree: Tree, exact: NDArray[np.float64]) -> NDArray[np.float32]:
    """A chain of fused multiply-adds wherever a product is added; the first product is rounded."""

    def node(parts: list[NDArray[Any]]) -> NDArray[Any]:
        first, second = parts[0], parts[1]
        if first.dtype == second.dtype == np.float64:
            first = first.astype(np.float32)
        # 48 digits of a product and 24 of a sum: float64 rounds rarely, and hardly ever to a tie.
        total: NDArray[Any] = first + second
        rounded: NDArray[Any] = total.astype(np.float32)
        return rounded

    columns = np.ascontiguousarray(exact.T)
    added: NDArray[np.float32] = fold(tree, lambda i: columns[i], node).astype(np.float32)
    return added


def first_terms(tree: Tree, k: int) -> Tree:
    """The order that is left of a tree when only its first k terms are added."""

    def node(parts: list[Tree]) -> Tree:
        kept = tuple(part for part in parts if part != ())
        return kept[0] if len(kept) == 1 else kept

    return fold(tree, lambda i: i if i < k else (), node)


def spread(trials: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Seeded terms of widely different sizes whose exact sum nearly vanishes.

    [trials, n]. Their sizes span more bits than an fp32 sum has, so that every sum is rounded, and
    what is left at the end is the rounding errors: another order shows, also in 16 bits.
    """
    generator = torch.Generator().manual_seed(n)
    half = n // 2
    largest = 13 if dtype == torch.float16 else 40 if dtype == torch.float64 else 20
    exponents = torch.randint(-largest, largest + 1, (trials, half), generator=generator)
    x = (1 + torch.rand(trials, half, generator=generator)) * torch.exp2(exponents)
    rest = torch.full((trials, n % 2), 2.0**-largest)
    all_ = torch.cat([x, -x, rest], 1)
    return all_[:, torch.randperm(n, generator=generator)].to(dtype)
