"""A second way to compute some rows of a batch, and those that follow from cutting a sequence.

A contract whose rows know a sequence names one of the generators here (or its own): T5 schedule is
the sequence computed in pieces, T6 packing the rows laid out beside others, T7 prefix a beginning
of the sequence without its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Args = Mapping[str, Any]
Axes = Mapping[str, int]


@dataclass(frozen=True)
class Variant:
    """Another call that computes some of the rows of a first one.

    transform, label: which kind, and which of its kind.
    rows, at: indices of the same rows in the result of the first call, and in that of this one.
    axes: the axis of each output along which they lie, if not the contract's.
    arranged: this call's outputs in the layout of the first call's, if it is another.
    """

    transform: str
    label: str
    args: dict[str, Any]
    rows: Sequence[int]
    at: Sequence[int]
    axes: tuple[int, ...] | None = None
    arranged: Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]] | None = None


def take(args: Args, axes: Axes, rows: Sequence[int]) -> dict[str, Any]:
    """The arguments with only these rows, in the memory order that they have."""
    index = torch.tensor(rows)
    return {
        name: same_layout(value, value.index_select(axes[name], index))
        if name in axes and isinstance(value, torch.Tensor)
        else value
        for name, value in args.items()
    }


def same_layout(original: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """A copy of `taken` in the memory order of `original`: strided cases stay strided."""
    strides = original.stride()
    order = sorted(range(original.dim()), key=lambda d: -strides[d])
    inverse = [order.index(d) for d in range(original.dim())]
    return taken.permute(order).contiguous().permute(inverse)


def tokens(args: Args, axes: Axes) -> Iterator[Variant]:
    """For operators whose rows are single tokens: the batch is one sequence of them."""
    count = next(value.size(axes[name]) for name, value in args.items() if name in axes)
    cut = 5 * count // 8
    for begin, end in ((0, cut), (cut, cut + 1), (cut + 1, count)):
        rows = range(begin, end)
        label = f"tokens {begin} to {end} of {count}"
        yield Variant("T5 schedule", label, take(args, axes, rows), rows, range(end - begin))
    if count % 4 == 0 and set(axes.values()) == {0} and args.get("dim", -1) == -1:
        packed = {
            name: value.unflatten(0, (4, count // 4))
            if name in axes and isinstance(value, torch.Tensor)
            else value
            for name, value in args.items()
        }
        label = f"as 4 sequences of {count // 4}"
        everything = range(count)
        yield Variant("T6 packing", label, packed, everything, everything, arranged=_flattened)
    first = range(count // 3)
    label = f"the first {len(first)} of {count} tokens"
    yield Variant("T7 prefix", label, take(args, axes, first), first, first)


def _flattened(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    # An output that is not asked for, such as a sum without a residual, is empty and has no rows.
    return tuple(x.flatten(0, 1) if x.dim() > 1 else x for x in outputs)


def rows_only(args: Args, axes: Axes) -> Iterator[Variant]:
    """`tokens` for operators that take exactly one batch dimension, so that nothing is packed."""
    return (variant for variant in tokens(args, axes) if variant.transform != "T6 packing")
