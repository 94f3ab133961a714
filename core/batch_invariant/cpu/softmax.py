"""softmax, log_softmax and their derivatives on CPU: native rows; plain torch order for float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.cpu import rows
from batch_invariant.cpu.reduce import cast
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.dims import from_rows_along, normalize, rows_along
from batch_invariant.ops.row_order import ROW_ORDER, lane_sum
from batch_invariant.ops.softmax import check_softmax_backward


def _forward(op: int) -> Callable[..., torch.Tensor]:
    def softmax(self: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
        normalize(dim, self.dim())
        x = cast(self, dtype)
        if not x.dtype.is_floating_point:
            raise OpNotSupported(f"softmax: expected a floating point tensor, got {x.dtype}")
        matrix = rows_along(x, dim)
        if matrix.dtype == torch.float64:
            out = _float64(op, matrix)
        else:
            out = rows.softmax(op, matrix, dtype or x.dtype)
        return from_rows_along(out, x.shape, dim)

    return softmax


def _float64(op: int, x: torch.Tensor) -> torch.Tensor:
    if x.numel() == 0:
        return x
    shifted = x - x.amax(1, keepdim=True)
    e: torch.Tensor = torch.ops.batch_invariant.exp.default(shifted)
    total = lane_sum(e)[:, None]
    if op == rows.SOFTMAX:
        return e / total
    out: torch.Tensor = shifted - torch.ops.batch_invariant.log.default(total)
    return out


def _backward(op: int) -> Callable[..., torch.Tensor]:
    def softmax_backward(
        grad_output: torch.Tensor, output: torch.Tensor, dim: int, input_dtype: torch.dtype
    ) -> torch.Tensor:
        check_softmax_backward(grad_output, output, dim)
        g, y = rows_along(grad_output, dim), rows_along(output, dim)
        if g.dtype == torch.float64:
            if op == rows.SOFTMAX:
                out = (g - lane_sum(g * y)[:, None]) * y
            else:
                out = g - torch.ops.batch_invariant.exp.default(y) * lane_sum(g)[:, None]
        elif input_dtype in (g.dtype, torch.float32):
            out = rows.softmax_backward(op, g, y, input_dtype)
        else:
            out = rows.softmax_backward(op, g, y, g.dtype).to(input_dtype)
        return from_rows_along(out, grad_output.shape, dim)

    return softmax_backward


def _kernel(fn: Callable[..., Any]) -> Kernel:
    return Kernel(
        fn=fn,
        guarantee=Guarantee.SCHEDULE,
        dtypes=frozenset((*FLOATS, torch.float64)),
        order=ROW_ORDER,
        portable=frozenset(FLOATS),
    )


KERNELS = {
    "softmax": _kernel(_forward(rows.SOFTMAX)),
    "log_softmax": _kernel(_forward(rows.LOG_SOFTMAX)),
    "softmax_backward": _kernel(_backward(rows.SOFTMAX)),
    "log_softmax_backward": _kernel(_backward(rows.LOG_SOFTMAX)),
}
