"""CPU tensors over the memory of the real torch_npu's tensors, which the stubs keep on the host."""

from __future__ import annotations

import ctypes

import torch
from npu_kernels import CpuKernels

Tensor = torch.Tensor
_MADE_BY_TORCH_NPU = """
    _local_scalar_dense empty empty_strided _copy_from _copy_from_and_resize set_ resize_
    record_stream
""".split()


def on_cpu(x: Tensor) -> Tensor:
    """The same memory as a CPU tensor; x is kept alive by the caller."""
    storage = x.untyped_storage()
    count = storage.nbytes() // x.element_size()
    if not count:
        return torch.empty(x.shape, dtype=x.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=x.dtype, count=count)
    return flat.as_strided(x.shape, x.stride(), x.storage_offset())


def on_npu(x: Tensor) -> Tensor:
    """A copy as a tensor of torch_npu, with the same strides."""
    out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="npu")
    on_cpu(out).copy_(x)
    return out


def install() -> int:
    """CPU kernels in the place of those that would launch something; returns how many."""
    kernels = CpuKernels(on_cpu, on_npu, lambda: 0, shares=False)
    return kernels.install(skipped=frozenset(_MADE_BY_TORCH_NPU))
