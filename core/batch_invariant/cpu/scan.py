"""cumsum on CPU: a serial chain, native in fp32, torch's own adds in float64."""

from __future__ import annotations

from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.cpu import rows
from batch_invariant.cpu.reduce import cast
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.dims import columns_of, from_rows_along, normalize, rows_along
from batch_invariant.order import serial
from batch_invariant.stock import stock


def _cumsum(self: torch.Tensor, dim: int, *, dtype: Any = None) -> torch.Tensor:
    result = dtype or self.dtype
    if not result.is_floating_point and not result.is_complex:
        out: torch.Tensor = stock("cumsum")(self, dim, dtype=dtype)
        return out
    (d,) = normalize(dim, self.dim()) or (0,)
    wide = cast(self, dtype)
    columns = columns_of(wide, d) if self.dim() and wide.dtype in FLOATS else None
    if columns is not None:
        return rows.cumsum(columns, result).view(self.shape)
    x = rows_along(wide, dim)
    sums = _serial(x) if x.dtype == torch.float64 else rows.cumsum(x, result)
    return from_rows_along(sums, self.shape, dim)


def _serial(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    total = x.new_zeros(len(x))
    for i in range(x.size(1)):
        total = total + x[:, i]
        out[:, i] = total
    return out


KERNELS = {
    "cumsum": Kernel(
        fn=_cumsum,
        guarantee=Guarantee.BATCH,
        dtypes=frozenset((*FLOATS, torch.float64)),
        order=serial(),
        portable=frozenset(FLOATS),
    )
}
