"""CPU tensors over the memory of the real torch_npu's tensors, which the stubs keep on the host."""

from __future__ import annotations

import ctypes

import torch

from npu_kernels import KEY, CpuKernels, libraries

Tensor = torch.Tensor
_MADE_BY_TORCH_NPU = """
    _local_scalar_dense empty empty_strided _copy_from _copy_from_and_resize set_ resize_
    record_stream is_pinned pin_memory _pin_memory new_empty_strided empty_like new_empty
    scaled_dot_product_attention
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


def _cast(input: Tensor, dtype: torch.dtype, *_: object) -> Tensor:
    return on_npu(on_cpu(input).to(dtype))


def install() -> int:
    """CPU kernels in the place of those that would launch something; returns how many."""
    kernels = CpuKernels(on_cpu, on_npu, lambda: 0, shares=False)
    # torch_npu casts by operators of its own, also where it calls itself.
    casts = torch.library.Library("npu", "IMPL")
    libraries.append(casts)
    for name in ("_npu_dtype_cast", "npu_dtype_cast"):
        casts.impl(name, _cast, KEY)
    return kernels.install(skipped=frozenset(_MADE_BY_TORCH_NPU))
