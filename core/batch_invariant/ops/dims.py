"""Torch's rules for `dim` arguments, and the view of a tensor as the rows that are reduced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

Dims = int | Sequence[int] | None


def normalize(dim: Dims, rank: int) -> tuple[int, ...]:
    """Non-negative dimensions in ascending order; None and an empty list mean all of them."""
    if dim is None:
        return tuple(range(rank))
    wanted = (dim,) if isinstance(dim, int) else tuple(dim)
    if len(wanted) == 1 and -rank <= wanted[0] < rank:
        return (wanted[0] % rank,)
    if not wanted:
        return tuple(range(rank))
    size = max(rank, 1)
    for d in wanted:
        if not -size <= d < size:
            raise IndexError(
                f"Dimension out of range (expected to be in range of [{-size}, {size - 1}], "
                f"but got {d})"
            )
    found = sorted(d % size for d in wanted)
    for first, second in pairwise(found):
        if first == second:
            raise RuntimeError(f"dim {first} appears multiple times in the list of dims")
    return () if rank == 0 else tuple(found)


def rows_of(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """`x` as a contiguous matrix [rows, n], n running over `dims` in ascending order."""
    rank = x.dim()
    if dims == (rank - 1,) and x.numel() and x.is_contiguous():
        return x.view(-1, x.size(-1))
    kept = [d for d in range(rank) if d not in dims]
    n = math.prod(x.size(d) for d in dims)
    rows = math.prod(x.size(d) for d in kept)
    return x.permute([*kept, *dims]).reshape(rows, n).contiguous()


def columns_of(x: torch.Tensor, dim: int) -> torch.Tensor | None:
    """A view [outer, n, inner] with `dim` in the middle and unit stride in inner.

    None where `dim` is the last one, the data is not contiguous, or `inner` is too narrow to be
    worth walking down columns.
    """
    inner = math.prod(x.shape[dim + 1 :])
    if dim == x.dim() - 1 or inner < 16 or not x.numel() or not x.is_contiguous():
        return None
    return x.view(-1, x.size(dim), inner)


def reduced_shape(shape: Sequence[int], dims: tuple[int, ...], keepdim: bool) -> list[int]:
    """The shape after reducing `dims`."""
    if dims == (len(shape) - 1,):
        return [*shape[:-1], 1] if keepdim else list(shape[:-1])
    if keepdim:
        return [1 if d in dims else size for d, size in enumerate(shape)]
    return [size for d, size in enumerate(shape) if d not in dims]


def rows_along(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`x` as a contiguous matrix [rows, n] whose rows run along one dimension."""
    rank = x.dim()
    if rank == 0:
        return x.reshape(1, 1)
    if dim in (-1, rank - 1) and x.numel() and x.is_contiguous():
        return x.view(-1, x.size(-1))
    return x.movedim(dim, -1).reshape(-1 if x.size(dim) else x.numel(), x.size(dim)).contiguous()


def from_rows_along(rows: torch.Tensor, shape: Sequence[int], dim: int) -> torch.Tensor:
    """Inverse of `rows_along`, for a result of the same or another length along `dim`."""
    if not shape:
        return rows.reshape(())
    d = dim % len(shape)
    if d == len(shape) - 1:
        return rows.view(*shape[:-1], rows.size(-1))
    moved = [size for i, size in enumerate(shape) if i != d]
    return rows.view(*moved, rows.size(-1)).movedim(-1, d).contiguous()
