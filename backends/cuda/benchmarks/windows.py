"""`bi.attention` with a window, a soft cap or sinks beside compiled FlexAttention, bf16, prefill.

FlexAttention has no sinks: what they do to a row is made of its log-sum-exp, in the same graph.

python backends/cuda/benchmarks/windows.py --out docs/benchmarks/cuda_windows.json
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import report
import torch
from attention import microseconds
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import batch_invariant as bi


class Kind(NamedTuple):
    """heads, key heads and head size of the models that attend like this."""

    heads: int
    key_heads: int
    size: int
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False


KINDS = {
    "causal": Kind(32, 8, 128),
    "window of 1024": Kind(32, 8, 128, window=1024),
    "window of 4096, soft cap": Kind(32, 8, 128, window=4096, soft_cap=50.0),
    "sinks": Kind(64, 8, 64, sinks=True),
    "window of 128, sinks": Kind(64, 8, 64, window=128, sinks=True),
}
SHAPES = ((1, 8192), (8, 2048))


def stock(kind: Kind, rows: int) -> Any:
    """FlexAttention of heads-first tensors, compiled for a kind."""

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = q >= k
        return near if kind.window is None else near & (q - k < kind.window)

    def score(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return kind.soft_cap * torch.tanh(s / kind.soft_cap)

    mask = create_block_mask(seen, None, None, rows, rows)

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        out, lse = flex_attention(
            q, k, v, score if kind.soft_cap else None, mask, enable_gqa=True, return_lse=True
        )
        if sinks is None:
            return out
        return out * torch.sigmoid(lse - sinks[:, None])[..., None].to(out.dtype)

    return torch.compile(run, dynamic=False)


def measure(kind: Kind, batch: int, rows: int) -> dict[str, float]:
    """Microseconds of both, and their ratio."""
    torch.compiler.reset()
    q, k, v = (
        torch.randn(batch, rows, heads, kind.size, device="cuda", dtype=torch.bfloat16)
        for heads in (kind.heads, kind.key_heads, kind.key_heads)
    )
    sinks = torch.randn(kind.heads, device="cuda") if kind.sinks else None
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    flex = stock(kind, rows)
    found = {"FlexAttention": microseconds(lambda: flex(*heads_first, sinks), 5)}
    lengths = torch.full((batch,), rows, device="cuda", dtype=torch.int32)
    options = {"window": kind.window, "soft_cap": kind.soft_cap, "sinks": sinks}
    found["bi.attention"] = microseconds(
        lambda: bi.attention(q, k, v, causal=True, seq_lens=lengths, **options), 5
    )
    found["ratio"] = round(found["bi.attention"] / found["FlexAttention"], 3)
    return found


def main() -> None:
    report.make(
        "windows",
        __doc__,
        {
            f"{name}, {batch} x {rows}": partial(measure, kind, batch, rows)
            for batch, rows in SHAPES
            for name, kind in KINDS.items()
        },
    )


if __name__ == "__main__":
    main()
