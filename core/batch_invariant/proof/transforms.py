"""The transforms of a batch under which a row's bits must stay: T1 to T4, for any contract.

T1 population: the row with fewer others. T2 position: the row elsewhere in the batch, and
elsewhere in memory. T3 neighbour content: the other rows replaced. T4 padding: rows appended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

ROWS = 64
POPULATIONS = (1, 2, 3, 7, 16, 33)
_KEPT = (0, 1, 7, 31, 63)


@dataclass(frozen=True)
class Variant:
    """Another batch that holds some of the same rows.

    rows: their indices in the original batch, and in the same order `at` in this one.
    """

    transform: str
    label: str
    args: dict[str, Any]
    rows: list[int]
    at: list[int]


Args = Mapping[str, Any]
Axes = Mapping[str, int]


def variants(args: Args, axes: Axes, seed: int = 0) -> Iterator[Variant]:
    """Every variant of a batch of `ROWS` rows."""
    everything = list(range(ROWS))
    for count in POPULATIONS:
        start = (ROWS - count) // 2
        chosen = everything[start : start + count]
        yield Variant(
            "T1 population",
            f"{count} of {ROWS} rows",
            _take(args, axes, chosen),
            chosen,
            list(range(count)),
        )
    for label, order in (("reversed", everything[::-1]), ("rolled by 13", _rolled(13))):
        yield Variant("T2 position", label, _take(args, axes, order), order, everything)
    yield Variant(
        "T2 position", "at another address", _misaligned(args, axes), everything, everything
    )
    generator = torch.Generator().manual_seed(seed)
    others = [row for row in everything if row not in _KEPT]
    for label, fill in _NEIGHBOURS.items():
        changed = {
            name: _replaced(value, axes[name], others, fill, generator)
            if name in axes and isinstance(value, torch.Tensor)
            else value
            for name, value in args.items()
        }
        yield Variant("T3 neighbours", label, changed, list(_KEPT), list(_KEPT))
    for extra in (1, 19):
        padded = _take(args, axes, everything + [ROWS - 1] * extra)
        blank = {
            name: _replaced(value, axes[name], list(range(ROWS, ROWS + extra)), _zeros, generator)
            if name in axes and isinstance(value, torch.Tensor)
            else value
            for name, value in padded.items()
        }
        yield Variant("T4 padding", f"{extra} more rows", blank, everything, everything)


def _rolled(by: int) -> list[int]:
    return [(row + by) % ROWS for row in range(ROWS)]


def _take(args: Args, axes: Axes, rows: list[int]) -> dict[str, Any]:
    index = torch.tensor(rows)
    return {
        name: _like_layout(value, value.index_select(axes[name], index))
        if name in axes and isinstance(value, torch.Tensor)
        else value
        for name, value in args.items()
    }


def _like_layout(original: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """The selection in the memory order of the original, so that strided cases stay strided."""
    strides = original.stride()
    order = sorted(range(original.dim()), key=lambda d: -strides[d])
    inverse = [order.index(d) for d in range(original.dim())]
    return taken.permute(order).contiguous().permute(inverse)


def _misaligned(args: Args, axes: Axes) -> dict[str, Any]:
    """The same rows, stored one element further on than allocators place them."""

    def shifted(value: torch.Tensor) -> torch.Tensor:
        room = torch.empty(value.numel() + 1, dtype=value.dtype)
        dense = _like_layout(value, value)
        return room[1:].as_strided(dense.shape, dense.stride(), 1).copy_(value)

    return {
        name: shifted(value) if name in axes and isinstance(value, torch.Tensor) else value
        for name, value in args.items()
    }


_Fill = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def _replaced(
    value: torch.Tensor, axis: int, rows: list[int], fill: _Fill, generator: torch.Generator
) -> torch.Tensor:
    out = _like_layout(value, value).clone()
    index = torch.tensor(rows)
    if value.dtype.is_floating_point:
        out.index_copy_(axis, index, fill(out.index_select(axis, index), generator))
    elif value.dtype == torch.bool:
        out.index_fill_(axis, index, True)
    else:
        out.index_fill_(axis, index, 0)
    return out


def _random(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(x.shape, generator=generator).to(x.dtype)


def _zeros(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.zeros_like(x)


def _huge(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.full_like(x, torch.finfo(x.dtype).max)


def _denormal(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.full_like(x, torch.finfo(x.dtype).smallest_normal / 4)


def _inf(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.full_like(x, torch.inf)


def _nan(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.full_like(x, torch.nan)


_NEIGHBOURS: dict[str, _Fill] = {
    "random": _random,
    "huge": _huge,
    "denormal": _denormal,
    "inf": _inf,
    "nan": _nan,
}
