"""Errors of attention beside stock torch's, both against float64 on the GPU.

Of every case the root mean square and the largest of the errors of ours, those of each stock kernel
that takes the call, and the ratio of ours to the stock kernel with the smallest root mean square.

python backends/cuda/benchmarks/accuracy.py --out docs/benchmarks/cuda_accuracy.json
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import report
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from batch_invariant_cuda import attention, varlen_attention

HALF = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
SINGLE = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
# batch, query heads, key heads, queries, keys, head size, causal
SHAPES = (
    (2, 8, 2, 1024, 1024, 64, True),
    (2, 8, 2, 1024, 1024, 128, True),
    (1, 8, 2, 300, 1000, 128, False),
    (64, 8, 2, 1, 512, 128, False),
    (16, 8, 2, 1, 4096, 128, False),
    (4, 8, 2, 1, 32768, 128, False),
)
KERNELS = {**attention.KERNELS, **varlen_attention.KERNELS}


def errors(found: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    e = found.double() - exact
    return {"rms": e.square().mean().sqrt().item(), "largest": e.abs().max().item()}


def measure(dtype: torch.dtype, deviation: float, shape: tuple[Any, ...]) -> dict[str, Any]:
    batch, heads, kv_heads, rows, keys, size, causal = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    q = (draw(batch, heads, rows, size) * deviation).to(dtype)
    k, v = (draw(batch, kv_heads, keys, size).to(dtype) for _ in "kv")
    k_all, v_all = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    with sdpa_kernel(SDPBackend.MATH):
        wide = (x.double() for x in (q, k_all, v_all))
        exact = scaled_dot_product_attention(*wide, is_causal=causal)
    ours = KERNELS["scaled_dot_product_attention"].fn(q, k, v, None, 0.0, causal, enable_gqa=True)[
        0
    ]
    of_sequences = KERNELS["attention"].fn(
        *(x.transpose(1, 2) for x in (q, k, v)), *(None,) * 6, causal, None, None, None
    )[0]
    found: dict[str, Any] = {
        "scaled_dot_product_attention": errors(ours, exact),
        "attention": errors(of_sequences.transpose(1, 2), exact),
    }
    stock = SINGLE if dtype == torch.float32 else HALF
    for backend in stock:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k_all, v_all, is_causal=causal)
            found[backend.name] = errors(out, exact)
    best = min((found[b.name] for b in stock), key=lambda e: e["rms"])
    for name in ("scaled_dot_product_attention", "attention"):
        for what in ("rms", "largest"):
            found[f"{name}, ratio of {what}"] = round(found[name][what] / best[what], 4)
    return found


def main() -> None:
    cases = {}
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for dtype, deviation, shape in itertools.product(dtypes, (1.0, 4.0), SHAPES):
        batch, heads, kv_heads, rows, keys, size, causal = shape
        label = (
            f"{str(dtype)[6:]}, deviation {deviation:g}, {batch} x {heads}/{kv_heads} heads x "
            f"{size}, {rows} of {keys}{', causal' if causal else ''}"
        )
        cases[label] = partial(measure, dtype, deviation, shape)
    report.make("accuracy", __doc__, cases, "difference from float64")


if __name__ == "__main__":
    main()
