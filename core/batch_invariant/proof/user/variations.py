"""The variations of a user's batch under which a row's result must stay as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from batch_invariant.proof.user.rows import Batch

_POPULATIONS = (2, 3, 4, 7, 8, 16, 17, 33, 64, 129, 256, 1000)
_EXTRA_ROWS = (1, 5)


@dataclass(frozen=True)
class Variation:
    """Another batch that holds some of the rows: `rows` in the original, `at` in this one."""

    transform: str
    label: str
    batch: Batch
    rows: list[int]
    at: list[int]


def variations(batch: Batch, neighbours: Sequence[str]) -> Iterator[Variation]:
    """Each row alone, sub-batches, other orders, other neighbours, rows appended."""
    size = batch.size
    everything = list(range(size))
    if size > 1:
        for row in everything:
            yield Variation("alone", f"row {row}", batch.take([row]), [row], [0])
    for count in sorted({count for count in (*_POPULATIONS, size - 1) if 1 < count < size}):
        start = (size - count) // 2
        rows = everything[start : start + count]
        label = f"{count} of {size} rows"
        yield Variation("population", label, batch.take(rows), rows, list(range(count)))
    if size > 1:
        orders = {"reversed": everything[::-1], "rolled by 1": everything[1:] + everything[:1]}
        for label, rows in orders.items():
            yield Variation("position", label, batch.take(rows), rows, everything)
    kept = sorted({0, size // 2, size - 1}) if size > 3 else [0]
    others = [row for row in everything if row not in kept]
    for label, changed in _with_neighbours(batch, others, neighbours):
        yield Variation("neighbours", label, changed, kept, kept)
    for extra in _EXTRA_ROWS:
        padded = batch.take(everything + [size - 1] * extra)
        label = f"{extra} more row{'s' if extra > 1 else ''}"
        yield Variation("padding", f"{label}, copies of the last", padded, everything, everything)
        if _has_floats(batch):
            blank = padded.replaced(range(size, size + extra), _filled(lambda dtype: 0.0))
            yield Variation("padding", f"{label}, zeros", blank, everything, everything)


def _with_neighbours(
    batch: Batch, others: list[int], neighbours: Sequence[str]
) -> Iterator[tuple[str, Batch]]:
    if not others:
        return
    rows = list(range(batch.size))
    for row, other in zip(others, [*others[1:], 0], strict=True):
        rows[row] = other
    yield "other rows of the batch", batch.take(rows)
    if any(_holds_ids(value) for _, value in batch.tensors()):
        yield "their ids shuffled", batch.replaced(others, _shuffled)
    if _has_floats(batch):
        for name in neighbours:
            yield name, batch.replaced(others, NEIGHBOURS[name])


def _has_floats(batch: Batch) -> bool:
    return any(value.is_floating_point() for _, value in batch.tensors())


def _holds_ids(value: torch.Tensor) -> bool:
    """Whole numbers that are no mask."""
    inexact = value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
    return not inexact and bool(((value != 0) & (value != 1)).any())


def _shuffled(rows: torch.Tensor) -> torch.Tensor:
    """The same ids in another order within each row; everything else as it is."""
    if not _holds_ids(rows) or rows[0].numel() < 2:
        return rows
    flat = rows.reshape(len(rows), -1)
    generator = torch.Generator().manual_seed(flat.shape[1])
    order = torch.randperm(flat.shape[1], generator=generator).to(flat.device)
    return flat[:, order].reshape(rows.shape)


def _filled(value: Callable[[torch.dtype], float]) -> Callable[[torch.Tensor], torch.Tensor]:
    def fill(rows: torch.Tensor) -> torch.Tensor:
        return torch.full_like(rows, value(rows.dtype)) if rows.is_floating_point() else rows

    return fill


def _random(rows: torch.Tensor) -> torch.Tensor:
    if not rows.is_floating_point():
        return rows
    generator = torch.Generator().manual_seed(rows.numel())
    return torch.randn(rows.shape, generator=generator).to(rows)


NEIGHBOURS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "random": _random,
    "huge": _filled(lambda dtype: torch.finfo(dtype).max),
    "inf": _filled(lambda dtype: torch.inf),
    "nan": _filled(lambda dtype: torch.nan),
}
"""What may stand in the place of other rows' floating-point values."""
