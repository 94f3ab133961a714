"""mm and linear: one serial chain over k, as a sum of outer products in fp32.

Step k adds the product of column k of the left matrix and row k of the right one to the whole
output. Every product is rounded, then added. An output element sees nothing but its own row and
column, in ascending k, so no other row can change its bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.matmul import check_linear, check_mm
from batch_invariant.order import serial
from batch_invariant_sample.dtypes import DTYPES, check_dtype

_BLOCK = 2**15  # outputs worked on at once, so that they stay in the cache: no bit depends on it


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` for [M, K] and [K, N], in fp32 and not rounded further."""
    a, b = a.float(), b.float().contiguous()
    out = a.new_zeros(a.size(0), b.size(1))
    rows = max(1, _BLOCK // max(1, b.size(1)))
    for left, total in zip(a.split(rows), out.split(rows), strict=True):
        for column, row in zip(left.unbind(1), b.unbind(0), strict=True):
            total += column[:, None] * row
    return out


def _mm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    check_mm(self, mat2)
    check_dtype("mm", self, mat2)
    return product(self, mat2).to(self.dtype)


def _linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    check_linear(input, weight, bias)
    check_dtype("linear", input, weight, bias)
    matrix = weight if weight.dim() == 2 else weight[None]
    rows = input.reshape(input.shape[:-1].numel(), input.size(-1))
    out = product(rows, matrix.mT)
    if bias is not None:
        out = out + bias.float()  # before the one rounding
    return out.to(input.dtype).view(*input.shape[:-1], *weight.shape[:-1])


def _kernel(fn: Callable[..., torch.Tensor]) -> Kernel:
    return Kernel(fn=fn, guarantee=Guarantee.SCHEDULE, dtypes=DTYPES, order=serial())


KERNELS = {"mm": _kernel(_mm), "linear": _kernel(_linear)}
