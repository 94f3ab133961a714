"""The transforms under which a row's bits must stay: T1 to T4 for any contract, T5 to T7 its own.

T1 population: the row with fewer or more others. T2 position: the row elsewhere in the batch, and
elsewhere in memory. T3 neighbours: the other rows replaced. T4 padding: rows appended. T5 schedule,
T6 packing and T7 prefix follow from how a sequence is cut, which the contract says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import Op
from batch_invariant.ops.variant import Args, Axes, Variant, same_layout, take

ROWS = 64
FEWER = (1, 2, 3, 7, 16, 33)
MORE = (257, 1040)
"""Populations: schedules change with the number of rows, so the rows also meet many others."""

_KEPT = (0, 1, 7, 31, 63)
_MANY = 4_000_000

LEVELS = {
    "T1 population": Guarantee.BATCH,
    "T2 position": Guarantee.BATCH,
    "T3 neighbours": Guarantee.BATCH,
    "T4 padding": Guarantee.BATCH,
    "T5 schedule": Guarantee.SCHEDULE,
    "T6 packing": Guarantee.SCHEDULE,
    "T7 prefix": Guarantee.SCHEDULE,
}
"""Every transform, and the lowest guarantee that promises it."""


def variants(op: Op, axes: Axes, args: Args, transform: str) -> Iterator[Variant]:
    """The variants of one transform for a batch of `ROWS` rows, the same in every process."""
    if LEVELS[transform] is Guarantee.BATCH:
        yield from _OF_A_BATCH[transform](args, axes)
    elif op.schedule is not None:
        for variant in op.schedule(args, axes):
            if variant.transform == transform:
                yield variant


def _population(args: Args, axes: Axes) -> Iterator[Variant]:
    for count in FEWER:
        start = (ROWS - count) // 2
        chosen = range(start, start + count)
        yield Variant(
            "T1 population",
            f"{count} of {ROWS} rows",
            take(args, axes, chosen),
            chosen,
            range(count),
        )
    size = max(value.numel() for name, value in args.items() if name in axes and _tensor(value))
    for count in MORE:
        if size // ROWS * count <= _MANY:
            order = [row % ROWS for row in range(count)]
            last = range(count - ROWS, count)
            yield Variant(
                "T1 population",
                f"{ROWS} of {count} rows",
                take(args, axes, order),
                [order[row] for row in last],
                last,
            )


def _position(args: Args, axes: Axes) -> Iterator[Variant]:
    everything = range(ROWS)
    rolled = [(row + 13) % ROWS for row in everything]
    for label, order in (("reversed", everything[::-1]), ("rolled by 13", rolled)):
        yield Variant("T2 position", label, take(args, axes, order), order, everything)
    moved = {name: _shifted(v) if name in axes and _tensor(v) else v for name, v in args.items()}
    yield Variant("T2 position", "at another address", moved, everything, everything)


def _neighbours(args: Args, axes: Axes) -> Iterator[Variant]:
    generator = torch.Generator().manual_seed(0)
    others = [row for row in range(ROWS) if row not in _KEPT]
    for label, fill in _FILLS.items():
        changed = {
            name: _replaced(value, axes[name], others, fill, generator)
            if name in axes and _tensor(value)
            else value
            for name, value in args.items()
        }
        yield Variant("T3 neighbours", label, changed, _KEPT, _KEPT)


def _padding(args: Args, axes: Axes) -> Iterator[Variant]:
    everything = range(ROWS)
    generator = torch.Generator()
    for extra in (1, 19):
        blank = list(range(ROWS, ROWS + extra))
        padded = {
            name: _replaced(value, axes[name], blank, _zeros, generator)
            if name in axes and _tensor(value)
            else value
            for name, value in take(args, axes, [*everything, *[ROWS - 1] * extra]).items()
        }
        yield Variant("T4 padding", f"{extra} more rows", padded, everything, everything)


_OF_A_BATCH = {
    "T1 population": _population,
    "T2 position": _position,
    "T3 neighbours": _neighbours,
    "T4 padding": _padding,
}


def _tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _shifted(value: torch.Tensor) -> torch.Tensor:
    """The same values, stored one element further on than allocators place them."""
    room = torch.empty(value.numel() + 1, dtype=value.dtype)
    dense = same_layout(value, value)
    return room[1:].as_strided(dense.shape, dense.stride(), 1).copy_(value)


_Fill = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def _replaced(
    value: torch.Tensor, axis: int, rows: list[int], fill: _Fill, generator: torch.Generator
) -> torch.Tensor:
    out = same_layout(value, value).clone()
    index = torch.tensor(rows)
    if value.dtype.is_floating_point:
        out.index_copy_(axis, index, fill(out.index_select(axis, index), generator))
    elif value.dtype == torch.bool:
        out.index_fill_(axis, index, True)
    elif fill is _random:
        most = int(value.max()) + 1 if value.numel() else 1
        shape = out.index_select(axis, index).shape
        drawn = torch.randint(0, most, shape, generator=generator, dtype=value.dtype)
        out.index_copy_(axis, index, drawn)
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


_FILLS: dict[str, _Fill] = {
    "random": _random,
    "huge": _huge,
    "denormal": _denormal,
    "inf": _inf,
    "nan": _nan,
}
