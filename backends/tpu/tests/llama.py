"""A small Llama in plain jax: once with the kernels, once with jax's own operators."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batch_invariant_tpu import jax as bi

LAYERS, WIDTH, HEADS, KV_HEADS, SIZE, HIDDEN, VOCABULARY = 2, 128, 4, 2, 32, 256, 320


@dataclass(frozen=True)
class Ours:
    """The operators of batch_invariant_tpu."""

    interpret: Any = True

    def linear(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return bi.linear(x, w, interpret=self.interpret)

    def norm(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return bi.rms_norm(x, w, 1e-5, interpret=self.interpret)

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return bi.attention(q, k, v, causal=True, interpret=self.interpret)

    def logits(self, x: jax.Array) -> jax.Array:
        return bi.log_softmax(x, interpret=self.interpret)


@dataclass(frozen=True)
class Plain:
    """jax's own: the negative control."""

    def linear(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.dot(x, w.T)

    def norm(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * w

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True).swapaxes(1, 2)

    def logits(self, x: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(x)


def weights(dtype: str) -> dict[str, Any]:
    """Random weights."""
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(generator.standard_normal(shape) / np.sqrt(shape[-1]), dtype)

    def layer() -> dict[str, jax.Array]:
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


def _rotated(x: jax.Array) -> jax.Array:
    """Rotary positions, [batch, heads, length, size]."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[2])[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


def forward(ops: Ours | Plain, w: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Log-probabilities of the last token's successor, [batch, vocabulary]."""
    batch, length = tokens.shape
    x = w["embedding"][tokens]

    def heads(y: jax.Array, count: int) -> jax.Array:
        return y.reshape(batch, length, count, SIZE).swapaxes(1, 2)

    for layer in w["layers"]:
        h = ops.norm(x, layer["before"])
        q = _rotated(heads(ops.linear(h, layer["q"]), HEADS))
        k = _rotated(heads(ops.linear(h, layer["k"]), KV_HEADS))
        v = heads(ops.linear(h, layer["v"]), KV_HEADS)
        y = ops.attention(q, k, v).swapaxes(1, 2).reshape(batch, length, -1)
        x = x + ops.linear(y, layer["out"])
        h = ops.norm(x, layer["after"])
        gate = ops.linear(h, layer["gate"])
        x = x + ops.linear(jax.nn.silu(gate) * ops.linear(h, layer["up"]), layer["down"])
    return ops.logits(ops.linear(ops.norm(x[:, -1], w["norm"]), w["head"]))
