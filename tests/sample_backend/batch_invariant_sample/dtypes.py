"""The dtypes that the kernels take, and the error for every other one."""

from __future__ import annotations

import torch

from batch_invariant.errors import OpNotSupported

DTYPES = frozenset((torch.float32, torch.bfloat16))


def refusal(op: str, dtype: torch.dtype) -> str | None:
    """Why a kernel refuses a dtype, in words for the user; None if it takes it."""
    if dtype in DTYPES:
        return None
    return f"{op} of the sample backend takes float32 and bfloat16; got {dtype}"


def check_dtype(op: str, *tensors: torch.Tensor | None) -> None:
    """Raises `OpNotSupported` unless every tensor is of a dtype in `DTYPES`."""
    for tensor in tensors:
        if tensor is not None and (reason := refusal(op, tensor.dtype)) is not None:
            raise OpNotSupported(reason)
