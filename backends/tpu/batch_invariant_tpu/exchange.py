"""Arrays across the border between torch and jax, by dlpack on the CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch

from batch_invariant.errors import OpNotSupported

DTYPES = (torch.float32, torch.bfloat16)
"""What the kernels compute in."""

_CARRIED = (*DTYPES, torch.float16, torch.bool, torch.int32)


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """A copy of a CPU tensor where jax computes: its TPU if there is one, else the CPU.

    int64, torch's dtype of indices, becomes jax's int32 if the values fit.
    """
    if tensor.dtype == torch.int64:
        narrow = tensor.to(torch.int32)
        if not torch.equal(narrow.to(torch.int64), tensor):
            raise OpNotSupported("the TPU backend takes indices below 2^31, and one is larger")
        tensor = narrow
    if tensor.dtype not in _CARRIED:
        # jax would narrow float64 without a word.
        raise OpNotSupported(f"the TPU backend takes float32 and bfloat16; got {tensor.dtype}")
    tensor = tensor.detach().contiguous()
    if not tensor.numel():
        return jnp.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    copy = jnp.array(jax.dlpack.from_dlpack(tensor), copy=True)
    device = jax.devices("cpu" if interpreted() else "tpu")[0]
    return jax.block_until_ready(jax.device_put(copy, device))


def to_torch(array: jax.Array) -> torch.Tensor:
    """A CPU tensor with the values of an array, in memory of its own; int32 becomes int64."""
    if not array.size:
        return widened(torch.empty(array.shape, dtype=getattr(torch, str(array.dtype))))
    here = jax.device_put(array, jax.devices("cpu")[0])
    tensor: torch.Tensor = torch.from_dlpack(here)
    return widened(tensor.clone())


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Indices in torch's dtype; anything else as it is."""
    return tensor.to(torch.int64) if tensor.dtype == torch.int32 else tensor


def dtype_of(dtype: torch.dtype) -> Any:
    """jax's name of a torch dtype."""
    return jnp.dtype(str(dtype).removeprefix("torch."))


def interpreted() -> bool:
    """Whether kernels called from torch are interpreted: there is no TPU to compile for."""
    return jax.default_backend() != "tpu"
