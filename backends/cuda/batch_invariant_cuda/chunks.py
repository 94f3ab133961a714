"""The order of the additions over k: a function of (K, N, dtype) and of nothing else."""

from __future__ import annotations

from functools import cache

import torch

from batch_invariant.ops.matmul import PORTABLE, portable_chunk
from batch_invariant.order import Order, chunked, fused, serial

STEP = 16
"""k of one step of the matrix units in bf16 and fp16: they add 16 products at once."""


@cache
def chunk_of(k: int, n: int, dtype: torch.dtype) -> int:
    """The k of one chunk; 0 means one chain over all of it.

    fp32 has the chains of the CPU reference, float64 has one. In bf16 and fp16 a
    product of few columns is cut, since few columns are few tiles: without chunks, which can be
    computed side by side, most of the GPU would wait.
    """
    if dtype is torch.float32:
        return portable_chunk(k)
    if dtype is torch.float64 or k < 2048:
        return 0
    if n <= 1536:
        return 2048 if k >= 8192 else 1024
    return 0


def order_of(dtype: torch.dtype) -> Order:
    """The order as data; where it depends on K and N, as text."""
    if dtype in (torch.bfloat16, torch.float16):
        return Order(f"{fused(STEP)} over k; for some (K, N) in chunks of k, added ascending")
    return PORTABLE if dtype is torch.float32 else serial()


def order_for(k: int, n: int, dtype: torch.dtype) -> Order:
    """The order of the additions for one K and N, with its tree."""
    if dtype not in (torch.bfloat16, torch.float16):
        return order_of(dtype)
    chunk = chunk_of(k, n, dtype)
    return chunked(chunk, fused(STEP)) if chunk else fused(STEP)
