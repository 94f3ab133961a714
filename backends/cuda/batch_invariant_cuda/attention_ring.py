"""When attention goes to `attention_hopper`, and how it is launched there."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from batch_invariant_cuda.row_launch import multiprocessors

_STAGES = 2
_SECTION = 16 << 20  # bytes of keys and values that stay in the cache while they are used
_SIZES = (64, 128)


@cache
def _hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def rings(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernel for Hopper takes a call: many rows, and addresses that it can copy from."""
    size = q.size(3)
    if not q.is_cuda or size != v.size(3) or size not in _SIZES or q.size(2) < 64:
        return False
    if k.size(2) == 0 or not _hopper(q.device.index):
        return False
    return all(
        x.data_ptr() % 16 == 0
        and all(n == 1 or (step > 0 and step % 8 == 0) for n, step in zip(x.shape, x.stride()[:3]))
        for x in (q, k, v)
    )


def _described(x: torch.Tensor, rows: int) -> Any:
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, 1, rows, x.size(3)]
    layout = NVMMASharedLayout.get_default_for(block, bfloat16 if x.dtype == torch.bfloat16 else float16)
    strides = [s if n > 1 else 8 for n, s in zip(x.shape[:3], x.stride())]
    return TensorDescriptor(x, [*x.shape], [*strides, 1], block, layout)


def attention_ring(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    odd: torch.Tensor,
    is_causal: bool,
    factor: float,
) -> None:
    """Computes `out` and `lse`; `odd` marks the rows whose results are not finite, where causal."""
    from batch_invariant_cuda import attention_hopper as hopper

    batch, heads, rows, size = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    blocks = -(-rows // hopper.ROWS)
    units = batch * heads * blocks
    programs = min(units, multiprocessors(q.device.index))
    near = max(1, _SECTION // (4 * keys * size)) * group
    hopper.attention_ring[(programs,)](
        _described(q, hopper.ROWS // 2), _described(k, hopper.KEYS), _described(v, hopper.KEYS),
        _described(out, hopper.ROWS // 2), lse, odd,
        batch * heads, heads, group, rows, keys, 0, blocks, near, -(-units // programs), units,
        factor, size, _STAGES, is_causal,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
