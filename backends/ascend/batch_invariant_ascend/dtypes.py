"""The dtypes that the kernels take, and the error for every other one."""

from __future__ import annotations

import torch

from batch_invariant.errors import OpNotSupported
from batch_invariant.ops.contract import FLOATS

DTYPES = frozenset(FLOATS)


def check_dtype(op: str, *tensors: torch.Tensor | None) -> None:
    """Raises `OpNotSupported` unless every tensor is of a dtype in `DTYPES`."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            raise OpNotSupported(
                f"{op} on Ascend takes float32, bfloat16 and float16, and got {tensor.dtype}: the "
                "NPU's cube and vector units have no invariant arithmetic for it; cast the "
                "tensor, or compute on the CPU"
            )


def accumulated(op: str, x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The input of a reduction in fp32, cast to `dtype` first where the caller asks for one."""
    check_dtype(op, x if dtype is None or x.dtype.is_floating_point or x.is_complex() else None)
    if dtype is not None and dtype not in DTYPES:
        check_dtype(op, x.new_empty(0, dtype=dtype))
    wide = x if dtype is None or dtype == torch.float32 else x.to(dtype)
    return wide.float()
