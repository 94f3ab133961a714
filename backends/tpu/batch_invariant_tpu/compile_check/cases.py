"""The kernels that are compiled, at shapes of language models, for a batch of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Shape = tuple[tuple[int, ...], str]


@dataclass(frozen=True)
class Case:
    """One kernel at one shape but for the batch.

    fn: a function of arrays that is one kernel. shapes: of its arrays, from the batch.
    batch_axes: of the kernel's grid, those that follow the batch.
    flops: from the batch, the arithmetic of the operator; what padding adds is not in it.
    plain: jax's own operator.
    kernels: how many kernels `fn` is.
    """

    name: str
    fn: Callable[..., Any]
    shapes: Callable[[int], list[Shape]]
    batch_axes: Sequence[int]
    flops: Callable[[int], float]
    plain: Callable[..., Any]
    kernels: int = 1


def cases(generation: str, dtype: str, full: bool) -> Iterator[Case]:
    """The cases of one generation and dtype; `full`: more shapes."""
    yield from _products(generation, dtype, full)
    yield from _rows(dtype, full)
    yield from _channels(dtype)
    yield from _elementwise(dtype)
    yield from _attention(dtype)


def _products(generation: str, dtype: str, full: bool) -> Iterator[Case]:
    import jax.numpy as jnp

    from batch_invariant_tpu.jax import linear, matmul
    from batch_invariant_tpu.jax.blocks import matmul_block

    sizes = [(4096, 4096), (14336, 4096)]
    sizes += [(4096, 14336), (1000, 300), (4096, 128256)] if full else []
    for k, n in sizes:
        block = matmul_block(k, n, dtype, generation)
        yield Case(
            f"matmul {k}x{n}",
            lambda x, w, block=block: matmul(x, w, block=block),
            lambda m, k=k, n=n: [((m, k), dtype), ((k, n), dtype)],
            (1,),
            lambda m, k=k, n=n: 2.0 * m * k * n,
            lambda x, w: jnp.dot(x, w),
        )
    block = matmul_block(4096, 4096, dtype, generation)
    yield Case(
        "linear 4096x4096, bias",
        lambda x, w, b: linear(x, w, b, block=block),
        lambda m: [((m, 4096), dtype), ((4096, 4096), dtype), ((4096,), dtype)],
        (1,),
        lambda m: 2.0 * m * 4096 * 4096,
        lambda x, w, b: jnp.dot(x, w.T) + b,
    )
    block = matmul_block(128, 1024, dtype, generation)
    yield Case(
        "matmul 8x128x1024, batched",
        lambda x, w: matmul(x, w, block=block),
        lambda m: [((m, 8, 128), dtype), ((m, 128, 1024), dtype)],
        (0,),
        lambda m: 2.0 * m * 8 * 128 * 1024,
        jnp.matmul,
    )


def _rows(dtype: str, full: bool) -> Iterator[Case]:
    import jax
    import jax.numpy as jnp

    from batch_invariant_tpu import jax as bi

    def plain_rms(x: Any, *rest: Any) -> Any:
        s = x.astype("float32")
        s = s * jax.lax.rsqrt(jnp.mean(s * s, -1, keepdims=True) + 1e-6)
        return (s * rest[0] if rest else s).astype(x.dtype)

    def plain_layer(x: Any, w: Any, b: Any) -> Any:
        s = x.astype("float32")
        s = s - jnp.mean(s, -1, keepdims=True)
        s = s * jax.lax.rsqrt(jnp.mean(s * s, -1, keepdims=True) + 1e-5)
        return (s * w + b).astype(x.dtype)

    long = 128256
    table: list[tuple[str, Any, Any, list[tuple[int, ...]]]] = [
        ("rms_norm 4096", bi.rms_norm, plain_rms, [(4096,)]),
        ("rms_norm 5000, no weight", bi.rms_norm, plain_rms, []),
        (
            "rms_norm 4096, residual",
            lambda x, w, r: bi.rms_norm(x, w, residual=r),
            lambda x, w, r: (plain_rms(x + r, w), x + r),
            [(4096,), (0, 4096)],
        ),
        ("layer_norm 4096", bi.layer_norm, plain_layer, [(4096,), (4096,)]),
        ("softmax 4096", bi.softmax, jax.nn.softmax, []),
        (f"log_softmax {long}", bi.log_softmax, jax.nn.log_softmax, []),
        ("logsumexp 4096", bi.logsumexp, lambda x: jax.nn.logsumexp(x, -1), []),
        ("sum 4096", bi.sum, lambda x: jnp.sum(x, -1), []),
        (f"mean {long}", bi.mean, lambda x: jnp.mean(x, -1), []),
        ("prod 4096", bi.prod, lambda x: jnp.prod(x, -1), []),
        ("var 4096", bi.var, lambda x: jnp.var(x, -1, ddof=1), []),
        ("std 4096", bi.std, lambda x: jnp.std(x, -1, ddof=1), []),
        ("norm 4096", bi.norm, lambda x: jnp.linalg.norm(x, axis=-1), []),
        ("norm 4096, of order 3", lambda x: bi.norm(x, 3), lambda x: jnp.sum(abs(x) ** 3, -1), []),
        ("cumsum 4096", bi.cumsum, lambda x: jnp.cumsum(x, -1), []),
        (
            "softmax_backward 4096",
            bi.softmax_backward,
            lambda g, y: y * (g - jnp.sum(g * y, -1, keepdims=True)),
            [(0, 4096)],
        ),
        (
            "log_softmax_backward 4096",
            bi.log_softmax_backward,
            lambda g, y: g - jnp.exp(y) * jnp.sum(g, -1, keepdims=True),
            [(0, 4096)],
        ),
    ]
    if full:
        table += [
            ("mean 70", bi.mean, lambda x: jnp.mean(x, -1), []),
            (f"rms_norm {long}", bi.rms_norm, plain_rms, []),
            (f"layer_norm {long}", bi.layer_norm, plain_layer, [(long,), (long,)]),
            (f"softmax {long}", bi.softmax, jax.nn.softmax, []),
        ]
    for name, fn, plain, others in table:
        n = int(name.split()[1].rstrip(","))
        yield Case(
            name,
            fn,
            lambda m, n=n, others=others: [
                ((m, n), dtype),
                *(((m, *o[1:]) if o[0] == 0 else o, dtype) for o in others),
            ],
            (0,),
            lambda m, n=n: 4.0 * m * n,
            plain,
        )


def _channels(dtype: str) -> Iterator[Case]:
    from batch_invariant_tpu import jax as bi

    def plain(x: Any, w: Any, b: Any) -> Any:
        g = x.reshape(x.shape[0], 8, -1)
        g = (g - g.mean(-1, keepdims=True)) / g.std(-1, keepdims=True)
        return g.reshape(x.shape) * w[:, None] + b[:, None]

    yield Case(
        "group_norm 64x196 in 8, weight and bias",
        lambda x, w, b: bi.group_norm(x, 8, w, b),
        lambda m: [((m, 64, 196), dtype), ((64,), dtype), ((64,), dtype)],
        (0,),
        lambda m: 6.0 * m * 64 * 196,
        plain,
        kernels=2,
    )


def _elementwise(dtype: str) -> Iterator[Case]:
    import jax
    import jax.numpy as jnp

    from batch_invariant_tpu import jax as bi
    from batch_invariant_tpu.jax.elementwise import FUNCTIONS

    plain = {
        **{name: getattr(jnp, name) for name in ("exp", "log", "sin", "cos", "tanh")},
        **{name: getattr(jax.nn, name) for name in ("sigmoid", "silu")},
        "rsqrt": jax.lax.rsqrt,
        "erf": jax.lax.erf,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": jax.nn.gelu,
    }
    table = {
        name: (lambda x, name=name: bi.elementwise(name, x), plain[name]) for name in FUNCTIONS
    }
    for exponent in (1.7, 3):
        table[f"pow, {exponent}"] = (
            lambda x, exponent=exponent: bi.pow(x, exponent),
            lambda x, exponent=exponent: jnp.power(x, exponent),
        )
    for name, (fn, own) in table.items():
        yield Case(
            f"{name} of 1024",
            fn,
            lambda m: [((m, 1024), dtype)],
            (0,),
            lambda m: 1.0 * m * 1024,
            own,
        )


def _attention(dtype: str) -> Iterator[Case]:
    import jax

    from batch_invariant_tpu import jax as bi

    heads, kv_heads, keys, size = 8, 2, 1024, 128

    def plain(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v).swapaxes(1, 2)

    yield Case(
        "attention, causal prefill",
        lambda q, k, v: bi.attention(q, k, v, causal=True),
        lambda m: [
            ((2, heads, m, size), dtype),
            *([((2, kv_heads, keys, size), dtype)] * 2),
        ],
        (0, 2),
        lambda m: 4.0 * 2 * heads * m * keys * size,
        plain,
    )
    yield Case(
        "attention, decode",
        lambda q, k, v, n: bi.attention(q, k, v, kv_lengths=n),
        lambda m: [
            ((m, heads, 1, size), dtype),
            *([((m, kv_heads, keys, size), dtype)] * 2),
            ((m,), "int32"),
        ],
        (0, 2),
        lambda m: 4.0 * m * heads * keys * size,
        lambda q, k, v, n: plain(q, k, v),
    )
