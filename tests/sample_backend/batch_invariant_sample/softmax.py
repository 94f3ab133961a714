"""softmax and its derivative: exact maximum, exp of the differences, one lane sum, one division."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.dims import from_rows_along, normalize, rows_along
from batch_invariant.ops.row_order import ROW_ORDER, lane_sum
from batch_invariant_sample.dtypes import DTYPES, check_dtype
from batch_invariant_sample.elementwise import exp_fp32


def _softmax(self: torch.Tensor, dim: int, dtype: Any = None) -> torch.Tensor:
    normalize(dim, self.dim())
    x = self if dtype is None else self.to(dtype)
    check_dtype("softmax", self, x)
    if not x.numel():
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = rows_along(x, dim).float()  # [rows, n]
    e = exp_fp32(rows - rows.amax(1, keepdim=True))
    out = (e / lane_sum(e)[:, None]).to(x.dtype)
    return from_rows_along(out, x.shape, dim)


def _softmax_backward(
    grad_output: torch.Tensor, output: torch.Tensor, dim: int, input_dtype: torch.dtype
) -> torch.Tensor:
    check_dtype("softmax_backward", grad_output, output)
    if grad_output.shape != output.shape or grad_output.dtype != output.dtype:
        # Torch would broadcast and promote, and hide a mistake.
        raise RuntimeError(
            "softmax_backward: expected gradient and output of one shape and dtype, got "
            f"{grad_output.dtype}{list(grad_output.shape)} and {output.dtype}{list(output.shape)}"
        )
    g, y = rows_along(grad_output, dim).float(), rows_along(output, dim).float()
    out = ((g - lane_sum(g * y)[:, None]) * y).to(input_dtype)
    return from_rows_along(out, grad_output.shape, dim)


def _kernel(fn: Callable[..., torch.Tensor]) -> Kernel:
    return Kernel(fn=fn, guarantee=Guarantee.SCHEDULE, dtypes=DTYPES, order=ROW_ORDER)


KERNELS = {"softmax": _kernel(_softmax), "softmax_backward": _kernel(_softmax_backward)}
