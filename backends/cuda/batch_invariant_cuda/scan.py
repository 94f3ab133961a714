"""cumsum on CUDA: every row one serial fp32 chain, as the contract says; float64 in plain torch.

A chain cannot be shared by threads, so each thread adds up one row: many rows are fast, one long
row takes the time of its additions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.dims import columns_of, from_rows_along, normalize, rows_along
from batch_invariant.order import serial
from batch_invariant.stock import stock
from batch_invariant_cuda.reduce import cast
from batch_invariant_cuda.row_launch import RowKernel
from batch_invariant_cuda.rows import FEW, rounded, take_turn


@triton.jit(do_not_specialize=["outer", "n", "inner"])
def _cumsum_kernel(x, out, outer, n, inner, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    take_turn()
    # Chain c = o * inner + i begins at o * n * inner + i; its elements are `inner` apart.
    step = inner.to(tl.int64)
    chain = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = chain < outer * step
    at = chain // step * n * step + chain % step
    total = tl.zeros((BLOCK,), tl.float32)
    whole = n // DEPTH * DEPTH
    for begin in tl.range(0, whole, DEPTH):
        values = ()
        for i in tl.static_range(DEPTH):
            v = tl.load(x + at + (begin + i) * step, mask=there, other=0.0).to(tl.float32)
            values = values + (v,)  # noqa: RUF005
        for i in tl.static_range(DEPTH):
            total += values[i]
            y = rounded(total, out.dtype.element_ty)
            tl.store(out + at + (begin + i) * step, y, mask=there)
    for i in tl.range(whole, n):
        total += tl.load(x + at + i * step, mask=there, other=0.0).to(tl.float32)
        tl.store(out + at + i * step, rounded(total, out.dtype.element_ty), mask=there)


_cumsum_chains = RowKernel(_cumsum_kernel, overlaps=FEW.value)


def _chains(x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Running sums along [rows, n], or along the middle of [outer, n, inner]."""
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    if not x.numel():
        return out
    if x.dim() == 2:
        outer, inner, n = len(x), 1, x.size(1)
    else:
        outer, n, inner = x.shape
    _cumsum_chains(-(-outer * inner // 32), (x, out), (outer, n, inner), (32, 16), 1, False)
    return out


def _cumsum(self: torch.Tensor, dim: int, *, dtype: Any = None) -> torch.Tensor:
    result = dtype or self.dtype
    if not result.is_floating_point and not result.is_complex:
        out: torch.Tensor = stock("cumsum", "CUDA")(self, dim, dtype=dtype)
        return out
    (d,) = normalize(dim, self.dim()) or (0,)
    wide = cast(self, dtype)
    columns = columns_of(wide, d) if self.dim() and wide.dtype in FLOATS else None
    if columns is not None:
        return _chains(columns, result).view(self.shape)
    x = rows_along(wide, dim)
    sums = _serial(x) if x.dtype == torch.float64 else _chains(x, result)
    return from_rows_along(sums, self.shape, dim)


def _serial(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    total = x.new_zeros(len(x))
    for i in range(x.size(1)):
        total = total + x[:, i]
        out[:, i] = total
    return out.masked_fill_(out.isnan(), math.nan)


KERNELS = {
    "cumsum": Kernel(
        fn=_cumsum,
        guarantee=Guarantee.BATCH,
        dtypes=frozenset((*FLOATS, torch.float64)),
        order=serial(),
        portable=frozenset(FLOATS),
    )
}
