"""`bi.attention` beside FlashInfer and stock torch, bf16, 32 query and 8 key heads of 128.

Decode reads pages that lie in no order, prefill is packed; stock is
`scaled_dot_product_attention` of dense sequences of the same lengths. FlashInfer's plans are made
before anything is timed: `CUDA cores` and `tensor cores` split keys as it likes, `one split` and
`splits of 2048` keys are how it keeps a sequence's bits in every batch.

python backends/cuda/benchmarks/flashinfer_peer.py \
    --out docs/benchmarks/cuda_flashinfer_peer.json
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flashinfer  # type: ignore[import-not-found]
import report
import torch
from attention import DECODE, HEADS, KEY_HEADS, SIZE, microseconds
from torch import Tensor
from varlen import PAGES, PREFILL, drawn, forms, stock

import batch_invariant as bi

WORKSPACE = 5 * 2**28  # bytes; splits of 2048 keys of 256 x 32768 need a little more than one GiB


def plans(size: int) -> dict[str, dict[str, Any]]:
    """FlashInfer's ways to compute a decode step; its splits are counted in pages."""
    return {
        "CUDA cores": {"use_tensor_cores": False},
        "tensor cores": {"use_tensor_cores": True},
        "one split": {"use_tensor_cores": True, "disable_split_kv": True},
        "splits of 2048": {"use_tensor_cores": True, "fixed_split_size": 2048 // size},
    }


def decode(
    tensors: list[Tensor], table: Tensor, use_tensor_cores: bool, **options: Any
) -> Callable[[], Any]:
    """A planned decode step; every page is full."""
    q, k, v = tensors
    batch, size = len(q), k.size(1)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(WORKSPACE, dtype=torch.uint8, device="cuda"), use_tensor_cores=use_tensor_cores
    )
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32) * table.size(1),
        table.flatten(),
        torch.full((batch,), size, dtype=torch.int32),
        HEADS,
        KEY_HEADS,
        SIZE,
        size,
        q_data_type=q.dtype,
        **options,
    )
    return partial(wrapper.run, q.squeeze(1), (k, v))


def prefill(tensors: list[Tensor], cuts: Tensor) -> Callable[[], Any]:
    """A planned causal prefill of packed sequences."""
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
        torch.zeros(WORKSPACE, dtype=torch.uint8, device="cuda")
    )
    wrapper.plan(cuts, cuts, HEADS, KEY_HEADS, SIZE, causal=True, q_data_type=tensors[0].dtype)
    return partial(wrapper.run, *tensors)


def measure(batch: int, rows: int, keys: int) -> dict[str, float]:
    """Microseconds of stock's kernels, of each of FlashInfer's plans and of ours; our ratio to the
    better of its default plans; the largest difference to ours, relative to our largest value."""
    q = drawn(batch, rows, HEADS, SIZE)
    k, v = (drawn(batch, keys, KEY_HEADS, SIZE) for _ in "kv")
    count = 20 if batch * rows * keys < 2**22 else 5
    found = stock(q, k, v, count)
    layouts = forms(q, k, v)
    for form in ("packed",) if rows == keys else (f"pages of {size}" for size in PAGES):
        tensors, layout = layouts[form]
        ours = partial(bi.attention, *tensors, causal=True, **layout)
        if rows == keys:
            theirs = {"default": prefill(tensors, layout["cu_seqlens_q"])}
        else:
            table = layout["block_table"]
            theirs = {
                name: decode(tensors, table, **options)
                for name, options in plans(tensors[1].size(1)).items()
            }
        expected = ours().flatten()
        for name, call in theirs.items():
            found[f"{form}, {name}"] = microseconds(call, count)
            error = (call().flatten() - expected).abs().max() / expected.abs().max()
            found[f"{form}, {name}, difference"] = round(error.item(), 4)
        found[f"{form}, ours"] = microseconds(ours, count)
        best = min(found[f"{form}, {name}"] for name in list(theirs)[:2])
        found[f"{form}, ratio"] = round(found[f"{form}, ours"] / best, 3)
    return found


def bits(batch: int, keys: int) -> dict[str, int]:
    """Of a decode step in pages of 16, the values of its first sequence that are not those of that
    sequence alone."""
    q = drawn(batch, 1, HEADS, SIZE)
    k, v = (drawn(batch, keys, KEY_HEADS, SIZE) for _ in "kv")
    (q, k, v), layout = forms(q, k, v)["pages of 16"]
    table, lengths = layout["block_table"], layout["seq_lens"]

    def first(call: Callable[[], Any]) -> Tensor:
        values: Tensor = call()[:1]
        return values.flatten().view(torch.int16)

    found = {}
    for name, options in plans(16).items():
        # both are kept until the sum is here: a plan is copied from host memory without waiting
        calls = decode([q, k, v], table, **options), decode([q[:1], k, v], table[:1], **options)
        whole, alone = map(first, calls)
        found[name] = int((whole != alone).sum())
    whole = first(lambda: bi.attention(q, k, v, causal=True, **layout))
    alone = first(
        lambda: bi.attention(q[:1], k, v, causal=True, block_table=table[:1], seq_lens=lengths[:1])
    )
    found["ours"] = int((whole != alone).sum())
    return found


def main() -> None:
    shapes = {f"prefill {b} x {n}": (b, n, n) for b, n in PREFILL}
    shapes |= {f"decode {b} x {n}": (b, 1, n) for b, n in DECODE}
    report.make(
        "flashinfer_peer",
        __doc__,
        {name: partial(measure, *shape) for name, shape in shapes.items()},
        differ_from_alone=lambda: {
            f"decode {b} x {n}": bits(b, n) for b, n in ((8, 4096), (64, 4096), (64, 32768))
        },
        flashinfer=lambda: flashinfer.__version__,
    )


if __name__ == "__main__":
    main()
