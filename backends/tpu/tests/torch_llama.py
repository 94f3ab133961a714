"""A small Llama in torch: its operators are the TPU backend's kernels, or torch's own.

The kernels get CPU tensors by dlpack, as `bi verify` does: the route that exists without a TPU.
"""

import math
from typing import Any

import torch

from batch_invariant import registry
from batch_invariant.ops import CONTRACTS

LAYERS, WIDTH, HEADS, KV_HEADS, SIZE, HIDDEN, VOCABULARY = 2, 128, 4, 2, 32, 256, 320
Weights = dict[str, Any]


class Ours:
    """The kernels of batch_invariant_tpu, with the arguments of core's contracts."""

    def __init__(self) -> None:
        self.backend = registry.load("tpu")
        self.kernels = self.backend.kernels()

    def call(self, name: str, /, **args: Any) -> torch.Tensor:
        native = {
            key: self.backend.to_native(value) if isinstance(value, torch.Tensor) else value
            for key, value in args.items()
        }
        return self.backend.to_torch(CONTRACTS[name].call(self.kernels[name].fn, native)[0])

    def embedding(self, table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.call("embedding", weight=table, indices=tokens)

    def linear(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return self.call("linear", input=x, weight=w, bias=None)

    def norm(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        none = {"residual": None, "variance_size": None}
        return self.call("rms_norm", input=x, weight=w, eps=1e-5, **none)

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        return self.call("silu", self=x)

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.call(
            "scaled_dot_product_attention",
            query=q,
            key=k,
            value=v,
            attn_mask=None,
            dropout_p=0.0,
            is_causal=True,
            enable_gqa=True,
        )

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.call("log_softmax", self=x, dim=-1, dtype=torch.float32)


class Plain:
    """torch's own: the negative control."""

    embedding = staticmethod(lambda table, tokens: table[tokens])
    linear = staticmethod(torch.nn.functional.linear)
    silu = staticmethod(torch.nn.functional.silu)

    def norm(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (WIDTH,), w, 1e-5)

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return x.log_softmax(-1, dtype=torch.float32)


def weights(dtype: torch.dtype) -> Weights:
    """Random weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
        return drawn.to(dtype)

    def layer() -> Weights:
        return {
            "q": draw(HEADS * SIZE, WIDTH),
            "k": draw(KV_HEADS * SIZE, WIDTH),
            "v": draw(KV_HEADS * SIZE, WIDTH),
            "out": draw(WIDTH, HEADS * SIZE),
            "gate": draw(HIDDEN, WIDTH),
            "up": draw(HIDDEN, WIDTH),
            "down": draw(WIDTH, HIDDEN),
            "before": 1 + draw(WIDTH),
            "after": 1 + draw(WIDTH),
        }

    return {
        "embedding": draw(VOCABULARY, WIDTH) * 4,
        "layers": [layer() for _ in range(LAYERS)],
        "norm": 1 + draw(WIDTH),
        "head": draw(VOCABULARY, WIDTH),
    }


def _rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions, [batch, heads, length, size]; the angles are the same for every row."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half].float(), x[..., half:].float()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


@torch.no_grad()
def forward(ops: Ours | Plain, w: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the last token's successor, [batch, vocabulary], in fp32."""
    batch, length = tokens.shape

    def heads(y: torch.Tensor, count: int) -> torch.Tensor:
        return y.view(batch, length, count, SIZE).transpose(1, 2)

    x = ops.embedding(w["embedding"], tokens)
    for layer in w["layers"]:
        h = ops.norm(x, layer["before"])
        q = _rotated(heads(ops.linear(h, layer["q"]), HEADS))
        k = _rotated(heads(ops.linear(h, layer["k"]), KV_HEADS))
        v = heads(ops.linear(h, layer["v"]), KV_HEADS)
        y = ops.attention(q, k, v).transpose(1, 2).reshape(batch, length, -1)
        x = x + ops.linear(y, layer["out"])
        h = ops.norm(x, layer["after"])
        x = x + ops.linear(
            ops.silu(ops.linear(h, layer["gate"])) * ops.linear(h, layer["up"]), layer["down"]
        )
    return ops.logits(ops.linear(ops.norm(x[:, -1], w["norm"]), w["head"]))
