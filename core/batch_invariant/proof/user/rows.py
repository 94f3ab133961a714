"""Rows of nested arguments and results: where the batch is, and taking and replacing rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from batch_invariant.errors import ConfigurationError

BatchDim = int | Mapping[str, int | None] | Mapping[int, int | None]


@dataclass(frozen=True)
class Batch:
    """The arguments of a call, and which of their tensors hold the rows.

    args: positional arguments as a tuple, or named ones as a dict. dims: the path of every tensor
    that holds the rows, such as "0" or "input_ids" or "1.mask", and the dimension they lie along.
    """

    args: tuple[Any, ...] | dict[str, Any]
    dims: dict[str, int]
    size: int

    def call(self, fn: Callable[..., Any]) -> Any:
        return fn(**self.args) if isinstance(self.args, dict) else fn(*self.args)

    def take(self, rows: Sequence[int]) -> Batch:
        """These rows, in this order; each tensor is a new one in the memory order of the old."""
        return dataclasses.replace(
            self._changed(lambda value, dim: _taken(value, dim, rows)), size=len(rows)
        )

    def replaced(self, rows: Sequence[int], fill: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """`fill` gets the named rows of every tensor, rows first, and returns what takes their
        place."""
        everything = range(self.size)

        def change(value: torch.Tensor, dim: int) -> torch.Tensor:
            out = _taken(value, dim, everything)
            if rows:
                index = torch.tensor(list(rows), device=value.device)
                with torch.no_grad():
                    new = fill(out.index_select(dim, index).movedim(dim, 0))
                    out.index_copy_(dim, index, new.movedim(0, dim))
            return out

        return self._changed(change)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that hold the rows."""
        return ((path, value) for path, value in leaves(self.args) if path in self.dims)

    def others(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that every call gets as they are."""
        return (
            (path, value)
            for path, value in leaves(self.args)
            if path not in self.dims and isinstance(value, torch.Tensor)
        )

    def _changed(self, change: Callable[[torch.Tensor, int], torch.Tensor]) -> Batch:
        def rebuilt(value: Any, path: str) -> Any:
            if path in self.dims:
                return change(value, self.dims[path])
            if not any(name.startswith(f"{path}.") for name in self.dims):
                return value
            parts = [rebuilt(part, f"{path}.{name}") for name, part in children(value)]
            if isinstance(value, Mapping):
                return dict(zip(value, parts, strict=True))
            if hasattr(value, "_fields"):
                return type(value)(*parts)
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                names = [field.name for field in dataclasses.fields(value)]
                return dataclasses.replace(value, **dict(zip(names, parts, strict=True)))
            return type(value)(parts)

        if isinstance(self.args, dict):
            args: Any = {name: rebuilt(value, name) for name, value in self.args.items()}
        else:
            args = tuple(rebuilt(value, str(i)) for i, value in enumerate(self.args))
        return dataclasses.replace(self, args=args)


def children(value: Any) -> list[tuple[str, Any]]:
    """The parts of a container with their names; nothing for everything else."""
    if isinstance(value, Mapping):
        return [(str(name), part) for name, part in value.items()]
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", range(len(value)))
        return [(str(name), part) for name, part in zip(names, value, strict=True)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return []


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested containers that is not a container, each with its path."""
    parts = children(value)
    if not parts:
        yield path, value
    for name, part in parts:
        yield from leaves(part, f"{path}.{name}" if path else name)


def find_rows(inputs: Any, batch_dim: BatchDim) -> Batch:
    """The arguments in `inputs`, and where their rows are; `ConfigurationError` if nowhere."""
    args: Any
    if isinstance(inputs, torch.Tensor):
        args = (inputs,)
    elif isinstance(inputs, Mapping):
        args = dict(inputs)
        if wrong := [name for name in args if not isinstance(name, str)]:
            raise ConfigurationError(f"inputs: {wrong[0]!r} is no name of an argument")
    elif isinstance(inputs, tuple):
        args = inputs
    else:
        raise ConfigurationError(
            f"inputs is a {type(inputs).__name__}; give a tensor, a tuple of positional arguments "
            "or a dict of named ones"
        )
    tensors = [(p, v) for p, v in leaves(args) if isinstance(v, torch.Tensor)]
    dims = _guessed(tensors, batch_dim) if isinstance(batch_dim, int) else _named(args, batch_dim)
    sizes = {path: value.shape[dims[path]] for path, value in tensors if path in dims}
    if not sizes:
        shapes = ", ".join(f"{path}: {list(value.shape)}" for path, value in tensors) or "none"
        raise ConfigurationError(
            f"batch_dim={batch_dim!r} is a dimension of no tensor in inputs ({shapes})"
        )
    if len(set(sizes.values())) > 1:
        raise ConfigurationError(f"batch_dim: the arguments disagree on the batch size: {sizes}")
    size = next(iter(sizes.values()))
    if not size:
        raise ConfigurationError("inputs has no rows: the batch size is 0")
    return Batch(args, dims, size)


def _guessed(tensors: list[tuple[str, torch.Tensor]], batch_dim: int) -> dict[str, int]:
    def has(value: torch.Tensor) -> bool:
        return -value.dim() <= batch_dim < value.dim()

    size = next((value.shape[batch_dim] for _, value in tensors if has(value)), 0)
    return {
        path: batch_dim % value.dim()
        for path, value in tensors
        if has(value) and value.shape[batch_dim] == size
    }


def _named(args: Any, batch_dim: Mapping[Any, int | None]) -> dict[str, int]:
    known = list(args) if isinstance(args, dict) else list(range(len(args)))
    if unknown := [key for key in batch_dim if key not in known]:
        raise ConfigurationError(f"batch_dim: no argument {unknown[0]!r}; there are: {known}")
    dims = {}
    for key, dim in batch_dim.items():
        if dim is None:
            continue
        for path, value in leaves(args[key], str(key)):
            if not isinstance(value, torch.Tensor):
                continue
            if not -value.dim() <= dim < value.dim():
                raise ConfigurationError(
                    f"batch_dim: {path} has shape {list(value.shape)}, so no dimension {dim}"
                )
            dims[path] = dim % value.dim()
    return dims


def _taken(value: torch.Tensor, dim: int, rows: Sequence[int]) -> torch.Tensor:
    taken = value.detach().index_select(dim, torch.tensor(list(rows), device=value.device))
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda d: -strides[d])
    inverse = [order.index(d) for d in range(value.dim())]
    laid_out = taken.permute(order).contiguous().permute(inverse)
    return laid_out.requires_grad_(value.requires_grad)


@dataclass(frozen=True)
class Axis:
    """A result of n rows has n * `each` entries along `dim`."""

    dim: int
    each: int

    def ways(self) -> list[int]:
        """How many entries of a row may lie before the next row's: 1 where rows lie together, all
        of them in time-major results, or a divisor between."""
        return [outer for outer in range(1, self.each + 1) if self.each % outer == 0]

    def row(self, value: torch.Tensor, size: int, position: int, outer: int = 1) -> torch.Tensor:
        """One of `size` rows, in the shape that a result of one row has."""
        split: torch.Tensor = value.unflatten(self.dim, (outer, size, self.each // outer))
        return split.select(self.dim + 1, position).flatten(self.dim, self.dim + 1)


class NoAxis(Exception):
    """Two shapes of one result that no single batch dimension explains."""


def axis_between(
    one: Sequence[int], one_size: int, other: Sequence[int], other_size: int
) -> Axis | None:
    """Where the rows of a result are, from its shapes at two batch sizes.

    None: the shape is the same at both. Raises `NoAxis`.
    """
    if len(one) != len(other):
        raise NoAxis
    changed = [dim for dim, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]]
    if not changed:
        return None
    dim = changed[0]
    each, rest = divmod(one[dim], one_size)
    if len(changed) > 1 or rest or other[dim] != other_size * each:
        raise NoAxis
    return Axis(dim, each)


def plain(value: torch.Tensor) -> bool:
    """Whether a tensor has bits in memory that can be read."""
    return (
        value.layout == torch.strided
        and value.device.type != "meta"
        and not value.is_quantized
        and not value.is_nested
    )


def readable(value: torch.Tensor) -> torch.Tensor:
    """The same numbers without autograd, lazy conjugation and complex dtypes."""
    value = value.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(value) if value.is_complex() else value
