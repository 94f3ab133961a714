"""Attention beside stock torch, bf16, 32 query and 8 key heads of 128: prefill and decode.

`masked` is a causal prefill with a boolean mask, half of whose sequences are padded on the left.

python backends/cuda/benchmarks/attention.py --out docs/benchmarks/cuda_attention.json
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import report
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from batch_invariant_cuda import attention

HEADS, KEY_HEADS, SIZE = 32, 8, 128
PREFILL = ((1, 8192), (8, 2048), (32, 512), (64, 256))
DECODE = tuple((b, n) for b in (1, 8, 64, 256) for n in (512, 4096, 32768))
STOCK = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
MASKED_STOCK = (SDPBackend.CUDNN_ATTENTION,)  # flash attention takes no mask


def microseconds(call: Callable[[], Any], count: int) -> float:
    """One call, by replay of a CUDA graph of `count` of them; the lowest of three."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    graph.replay()
    times = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return round(min(times) * 1e3 / count, 2)


def padded(batch: int, rows: int) -> torch.Tensor:
    """A causal mask [batch, 1, rows, rows]; every other sequence begins at a quarter."""
    causal = torch.ones(rows, rows, dtype=torch.bool, device="cuda").tril()
    mask = causal.repeat(batch, 1, 1, 1)
    mask[1::2, ..., : rows // 4] = False
    return mask


def measure(batch: int, rows: int, keys: int, masked: bool = False) -> dict[str, float]:
    """Microseconds of each stock kernel, of ours, and of ours by one program for all keys; the
    ratio to the best stock one; of a decode step the TB/s at which keys and values are read."""
    shapes = ((HEADS, rows), (KEY_HEADS, keys), (KEY_HEADS, keys))
    q, k, v = (
        torch.randn(batch, heads, length, SIZE, device="cuda", dtype=torch.bfloat16)
        for heads, length in shapes
    )
    causal, mask = rows == keys and not masked, padded(batch, rows) if masked else None
    count = 20 if batch * rows * keys < 2**22 else 5
    found = {}
    stock = MASKED_STOCK if masked else STOCK
    for backend in stock:
        with sdpa_kernel(backend):
            found[backend.name] = microseconds(
                lambda: scaled_dot_product_attention(
                    q, k, v, mask, is_causal=causal, enable_gqa=True
                ),
                count,
            )
    ours = attention.KERNELS["scaled_dot_product_attention"].fn

    def call() -> Any:
        return ours(q, k, v, mask, 0.0, causal, enable_gqa=True)

    found["ours"] = microseconds(call, count)
    found["ratio"] = round(found["ours"] / min(found[b.name] for b in stock), 3)
    if rows < keys:
        found["TB/s"] = round((k.nbytes + v.nbytes) / found["ours"] / 1e6, 2)
        chosen, attention.run_of = attention.run_of, lambda tiles, blocks, processors: blocks
        attention.forget()
        found["ours, one split"] = microseconds(call, count)
        attention.run_of = chosen
        attention.forget()
    return found


def main() -> None:
    shapes: dict[str, tuple[Any, ...]] = {f"prefill {b} x {n}": (b, n, n) for b, n in PREFILL}
    shapes |= {f"masked {b} x {n}": (b, n, n, True) for b, n in PREFILL[1:]}
    shapes |= {f"decode {b} x {n}": (b, 1, n) for b, n in DECODE}
    report.make("attention", __doc__, {k: partial(measure, *shape) for k, shape in shapes.items()})


if __name__ == "__main__":
    main()
