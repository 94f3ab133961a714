"""What the GPU tests share: whether there is a GPU, and comparing bits."""

from __future__ import annotations

import importlib.util

import torch

REASON = ""
if not torch.cuda.is_available():
    REASON = "torch finds no CUDA GPU"
elif importlib.util.find_spec("triton") is None:
    REASON = "Triton is not installed"

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many elements of two tensors differ in bits."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    view = BITS[a.dtype.itemsize]
    return int((a.contiguous().view(view) != b.contiguous().view(view)).sum())
