"""Attention in fp32 beside stock torch, 32 query and 8 key heads: prefill and decode.

The stock kernels get keys and values of every query head, so that they need not copy them; `masked`
is a causal prefill with a boolean mask, half of whose sequences are padded on the left.

python backends/cuda/benchmarks/attention_fp32.py --out docs/benchmarks/cuda_attention_fp32.json
"""

from __future__ import annotations

from functools import partial

import report
import torch
from attention import HEADS, KEY_HEADS, microseconds, padded
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from batch_invariant_cuda import attention, varlen_attention

# batch, queries, keys, head size, masked
SHAPES = {
    "prefill 1 x 4096, 128": (1, 4096, 4096, 128, False),
    "prefill 8 x 512, 64": (8, 512, 512, 64, False),
    "prefill 2 x 1024, 256": (2, 1024, 1024, 256, False),
    "masked 8 x 512, 128": (8, 512, 512, 128, True),
    "decode 8 x 4096, 128": (8, 1, 4096, 128, False),
    "decode 64 x 512, 64": (64, 1, 512, 64, False),
}
STOCK = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
KERNELS = {**attention.KERNELS, **varlen_attention.KERNELS}


def measure(batch: int, rows: int, keys: int, size: int, masked: bool) -> dict[str, float]:
    """Microseconds of each stock kernel and of ours; the ratios to the best stock one."""
    q, k, v = (
        torch.randn(batch, heads, length, size, device="cuda")
        for heads, length in ((HEADS, rows), (KEY_HEADS, keys), (KEY_HEADS, keys))
    )
    causal, mask = rows == keys and not masked, padded(batch, rows) if masked else None
    k_all, v_all = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (k, v))
    found = {}
    for backend in STOCK:
        with sdpa_kernel(backend):
            found[backend.name] = microseconds(
                lambda: scaled_dot_product_attention(q, k_all, v_all, mask, is_causal=causal), 5
            )
    best = min(found.values())
    ours, of_sequences = (KERNELS[op].fn for op in ("scaled_dot_product_attention", "attention"))
    calls = {"ours": lambda: ours(q, k, v, mask, 0.0, causal, enable_gqa=True)}
    if not masked:
        packed = tuple(x.transpose(1, 2) for x in (q, k, v))
        calls["bi.attention"] = lambda: of_sequences(*packed, *(None,) * 6, causal, *(None,) * 3)
    for name, call in calls.items():
        found[name] = microseconds(call, 5)
        found[f"{name}, ratio"] = round(found[name] / best, 3)
    return found


def main() -> None:
    lines = {label: partial(measure, *shape) for label, shape in SHAPES.items()}
    report.make("attention_fp32", __doc__, lines)


if __name__ == "__main__":
    main()
