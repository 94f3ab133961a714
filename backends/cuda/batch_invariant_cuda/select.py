"""argmax and topk on CUDA: exact selections by an integer key, the lowest index first in a tie.

A key holds the rank of a number (NaN above all, -0 equal to +0) and its index, so no two elements
of a row have the same one, and torch's selection of the k largest integers has one answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.dims import (
    from_rows_along,
    normalize,
    reduced_shape,
    rows_along,
    rows_of,
)
from batch_invariant.ops.select import topk_shape
from batch_invariant.order import undeclared
from batch_invariant.stock import stock
from batch_invariant_cuda.row_launch import RowKernel
from batch_invariant_cuda.rows import FEW, take_turn

_BLOCK = 1024
_INDEX = 2**32


@triton.jit(do_not_specialize=["n", "blocks"])
def _key_kernel(x, keys, n, blocks, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    take_turn()
    task = tl.program_id(0).to(tl.int64)
    row, block = task // blocks, task % blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    there = column < n
    v = tl.load(x + row * n + column, mask=there, other=0.0).to(tl.float32)
    bits = (v + 0.0).to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    rank = tl.where(v == v, rank, 0x7FFFFFFF)
    if not LARGEST:
        rank = -1 - rank
    key = (rank.to(tl.int64) << 32) | (0xFFFFFFFF - column)
    tl.store(keys + row * n + column, key, mask=there)


_keys = RowKernel(_key_kernel, overlaps=FEW.value)


def topk_rows(x: torch.Tensor, k: int, largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The first k values of every row of contiguous x [rows, n], best first, and where they are."""
    rows, n = x.shape
    if not x.numel() or k == 0:
        return x.new_empty(rows, k), x.new_empty(rows, k, dtype=torch.int64)
    keys = torch.empty(rows, n, dtype=torch.int64, device=x.device)
    blocks = -(-n // _BLOCK)
    _keys(rows * blocks, (x, keys), (n, blocks), (largest, _BLOCK), 4, False)
    best = stock("topk", "CUDA")(keys, k, 1, True, True)[0]
    indices = (_INDEX - 1) - (best & (_INDEX - 1))
    return stock("gather", "CUDA")(x, 1, indices), indices


def _argmax(self: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    dims = normalize(dim, self.dim())
    x = rows_of(self, dims)
    if x.size(1) == 0:
        raise IndexError(
            f"argmax: expected a reduction dim with at least one element, got {list(self.shape)}"
        )
    out: torch.Tensor = stock("argmax", "CUDA")(x, 1, False)
    return out.view(reduced_shape(self.shape, dims, keepdim))


def _topk(
    self: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    topk_shape(self, k, dim)
    x = rows_along(self, dim)
    if x.dtype in FLOATS:
        values, indices = topk_rows(x, k, largest)
    else:
        values, indices = stock("sort.stable", "CUDA")(x, stable=True, dim=1, descending=largest)
        values, indices = values[:, :k].contiguous(), indices[:, :k].contiguous()
    return from_rows_along(values, self.shape, dim), from_rows_along(indices, self.shape, dim)


def _kernel(fn: Callable[..., Any]) -> Kernel:
    return Kernel(
        fn=fn,
        guarantee=Guarantee.SCHEDULE,
        dtypes=frozenset((*FLOATS, torch.float64)),
        order=undeclared("exact selection, lowest index first"),
        portable=frozenset((*FLOATS, torch.float64)),
    )


KERNELS = {"argmax": _kernel(_argmax), "topk": _kernel(_topk)}
