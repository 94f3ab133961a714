"""sum and mean, by the one row order of `batch_invariant.ops.row_order`.

That order is elementwise additions only, so it has the same bits on every device: the kernels are
declared portable, and the proof kit compares them with the digests of the CPU reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.dims import normalize, reduced_shape, rows_of
from batch_invariant.ops.row_order import ROW_ORDER, lane_sum
from batch_invariant.stock import stock
from batch_invariant_sample.dtypes import DTYPES, check_dtype, refusal


def _supports(
    self: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> str | None:
    # The tensor's dtype is declared with the kernel; here is what else a call may ask for.
    return None if dtype is None else refusal("a reduction", dtype)


def _reduced(
    self: torch.Tensor, dim: Any, keepdim: bool, dtype: torch.dtype | None, mean: bool
) -> torch.Tensor:
    check_dtype("a reduction", self)
    if (reason := _supports(self, dim, keepdim, dtype=dtype)) is not None:
        raise OpNotSupported(reason)
    dims = normalize(dim, self.dim())
    rows = rows_of(self, dims)  # [rows, n], n over the reduced dimensions
    out = lane_sum(rows)
    out = out / rows.size(1) if mean else out
    return out.to(dtype or self.dtype).view(reduced_shape(self.shape, dims, keepdim))


def _sum(
    self: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> torch.Tensor:
    if not (self.is_floating_point() or self.is_complex() or dtype):
        # Integers are exact in any order: torch's own kernel, which the mode has overridden.
        out: torch.Tensor = stock("sum.dim_IntList")(self, dim, keepdim)
        return out
    return _reduced(self, dim, keepdim, dtype, mean=False)


def _mean(
    self: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> torch.Tensor:
    return _reduced(self, dim, keepdim, dtype, mean=True)


def _kernel(fn: Callable[..., torch.Tensor]) -> Kernel:
    return Kernel(
        fn=fn,
        guarantee=Guarantee.SCHEDULE,
        dtypes=DTYPES,
        order=ROW_ORDER,
        portable=DTYPES,
        supports=_supports,
    )


KERNELS = {"sum": _kernel(_sum), "mean": _kernel(_mean)}
