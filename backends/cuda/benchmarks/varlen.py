"""`bi.attention` beside stock torch, bf16, 32 query and 8 key heads of 128: prefill and decode.

Stock is `scaled_dot_product_attention` of dense sequences of the same lengths, without pages.
`host_us`: how long an eager call keeps the host busy, lengths on the GPU, the queue empty before.

python backends/cuda/benchmarks/varlen.py --out docs/benchmarks/cuda_varlen.json
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import report
import torch
from attention import DECODE, HEADS, KEY_HEADS, SIZE, STOCK, microseconds
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import batch_invariant as bi

PREFILL = ((1, 8192), (8, 2048), (32, 512))
PAGES = (16, 128)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int) -> dict[str, float]:
    """Microseconds of each stock kernel, of tensors laid out as it likes them."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    causal = q.size(2) == k.size(2)
    found = {}
    for backend in STOCK:
        with sdpa_kernel(backend):
            found[backend.name] = microseconds(
                lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True),
                count,
            )
    return found


def forms(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> dict[str, tuple[list[torch.Tensor], dict[str, torch.Tensor]]]:
    """The tensors and the layout of each form of the same sequences; pages lie in no order."""
    batch, keys = k.shape[:2]
    lengths = torch.full((batch,), keys, device="cuda", dtype=torch.int32)
    found = {"dense": ([q, k, v], {}), "padded": ([q, k, v], {"seq_lens": lengths})}
    if q.size(1) == keys:
        cuts = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * keys
        packed = [x.flatten(0, 1) for x in (q, k, v)]
        found["packed"] = (packed, {"cu_seqlens_q": cuts, "cu_seqlens_k": cuts})
    for size in PAGES:
        table = torch.randperm(batch * keys // size, device="cuda").int().view(batch, -1)
        paged = [q, *(x.view(-1, size, KEY_HEADS, SIZE) for x in (k, v))]
        found[f"pages of {size}"] = (paged, {"block_table": table, "seq_lens": lengths})
    return found


def measure(batch: int, rows: int, keys: int) -> dict[str, float]:
    """Microseconds of each stock kernel and of each form of ours; its ratio to the best stock one;
    of a decode step the TB/s at which keys and values are read."""
    q = drawn(batch, rows, HEADS, SIZE)
    k, v = (drawn(batch, keys, KEY_HEADS, SIZE) for _ in "kv")
    count = 20 if batch * rows * keys < 2**22 else 5
    found = stock(q, k, v, count)
    best = min(found.values())
    for name, (tensors, layout) in forms(q, k, v).items():

        def call(
            tensors: list[torch.Tensor] = tensors, layout: dict[str, torch.Tensor] = layout
        ) -> Any:
            return bi.attention(*tensors, causal=True, **layout)

        found[name] = microseconds(call, count)
        found[f"{name}, ratio"] = round(found[name] / best, 3)
        if rows < keys:
            found[f"{name}, TB/s"] = round((k.nbytes + v.nbytes) / found[name] / 1e6, 2)
    return found


def host_us(call: Callable[[], Any]) -> float:
    """Microseconds, the median of 50 calls."""
    times = []
    for _ in range(60):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return round(sorted(times[10:])[25] * 1e6, 1)


def host(batch: int, rows: int, keys: int) -> dict[str, float]:
    """Host time of stock torch's choice of a kernel and of each form of ours."""
    q = drawn(batch, rows, HEADS, SIZE)
    k, v = (drawn(batch, keys, KEY_HEADS, SIZE) for _ in "kv")
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    causal = rows == keys
    with torch.inference_mode():
        found = {
            "stock": host_us(
                lambda: scaled_dot_product_attention(
                    *heads_first, is_causal=causal, enable_gqa=True
                )
            )
        }
        for name, (tensors, layout) in forms(q, k, v).items():
            found[name] = host_us(
                lambda tensors=tensors, layout=layout: bi.attention(  # type: ignore[misc]
                    *tensors, causal=True, **layout
                )
            )
    return found


def main() -> None:
    shapes = {f"prefill {b} x {n}": (b, n, n) for b, n in PREFILL}
    shapes |= {f"decode {b} x {n}": (b, 1, n) for b, n in DECODE}
    report.make(
        "varlen", __doc__, {k: partial(measure, *shape) for k, shape in shapes.items()},
        host_us=lambda: {"prefill 8 x 256": host(8, 256, 256), "decode 8 x 512": host(8, 1, 512)},
    )  # fmt: skip


if __name__ == "__main__":
    main()
