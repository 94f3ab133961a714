"""The order of the additions over k: a function of (K, N, dtype) and of nothing else."""

from __future__ import annotations

from functools import cache

import torch

from batch_invariant.ops.matmul import PORTABLE, portable_chunk
from batch_invariant.order import Order, chunked, fused, serial

STEP = 16
"""k of one step of the matrix units in bf16 and fp16: they add 16 products at once."""

TF32 = Order("fp32 by the matrix units in TF32, as asked: one chain of their steps over k")
"""Measured on an H200: every schedule of the kind "tile" has one result."""


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


DEPTHS = (2048, 8192)
"""`chunk_of` changes with K at these alone."""


def chunks_by_depth(n: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """The chunks of a product of N columns with a K below the first of `DEPTHS`, the second, above.

    For a kernel that learns K on the device.
    """
    return (
        chunk_of(DEPTHS[0] - 1, n, dtype),
        chunk_of(DEPTHS[1] - 1, n, dtype),
        chunk_of(DEPTHS[1], n, dtype),
    )


def tf32_asked() -> bool:
    """Whether the user allowed TF32 in products of fp32, by any of torch's own switches.

    They are `torch.backends.cuda.matmul.fp32_precision = "tf32"`, its older form `allow_tf32`,
    `torch.backends.fp32_precision` and `torch.set_float32_matmul_precision`; torch keeps one state.
    """
    return bool(torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32")


def order_of(dtype: torch.dtype) -> Order:
    """The order as data; where it depends on K and N, as text."""
    if dtype is torch.float32 and tf32_asked():
        return TF32
    if dtype in (torch.bfloat16, torch.float16):
        return Order(f"{fused(STEP)} over k; for some (K, N) in chunks of k, added ascending")
    return PORTABLE if dtype is torch.float32 else serial()


def order_for(k: int, n: int, dtype: torch.dtype) -> Order:
    """The order of the additions for one K and N, with its tree."""
    if dtype not in (torch.bfloat16, torch.float16):
        return order_of(dtype)
    chunk = chunk_of(k, n, dtype)
    return chunked(chunk, fused(STEP)) if chunk else fused(STEP)
