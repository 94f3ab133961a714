"""Comparison of tensors by their bits: NaN equals the same NaN, and +0 is not -0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: torch.Tensor) -> torch.Tensor:
    """The integer view of a tensor's elements."""
    return x.contiguous().view(_INTEGER[x.element_size()]) if x.dtype != torch.bool else x


@dataclass(frozen=True)
class Mismatch:
    """Where two tensors differ: how many elements, the first one's index, the largest distance."""

    count: int
    total: int
    first: tuple[int, ...]
    largest: float

    def __str__(self) -> str:
        return (
            f"{self.count} of {self.total} values, the first at {list(self.first)}, "
            f"max |diff| {self.largest:.3g}"
        )


def mismatch(a: torch.Tensor, b: torch.Tensor) -> Mismatch | None:
    """None if shape, dtype and every bit are equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"cannot compare {a.dtype}{list(a.shape)} with {b.dtype}{list(b.shape)}")
    unequal = bits(a) != bits(b)
    count = int(unequal.sum())
    if not count:
        return None
    first = tuple(int(i) for i in unequal.nonzero()[0])
    distance = (a.double() - b.double()).abs().nan_to_num(nan=torch.inf)
    return Mismatch(count, a.numel(), first, float(distance[unequal].max()))


def difference(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> str | None:
    """None if two results are the same bit for bit, else where they first differ."""
    for which, (x, y) in enumerate(zip(a, b, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"output {which} is {x.dtype}{list(x.shape)} and {y.dtype}{list(y.shape)}"
        if (found := mismatch(x, y)) is not None:
            return f"output {which} differs in {found}"
    return None
