"""Attention: exact enough, and a query's bits do not depend on what it cannot see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batch_invariant.errors import OpNotSupported
from batch_invariant_tpu import jax as bi
from batch_invariant_tpu.interpreter_check import bits, interpret_of

GENERATOR = np.random.default_rng(0)
B, HEADS, KV, LENGTH, SIZE = 2, 4, 2, 37, 64
Q = GENERATOR.standard_normal((B, HEADS, LENGTH, SIZE)).astype(np.float32)
K = GENERATOR.standard_normal((B, KV, 300, SIZE)).astype(np.float32)
V = GENERATOR.standard_normal((B, KV, 300, SIZE)).astype(np.float32)


def _exact(q, k, v, seen):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = np.where(seen, q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p @ v / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_is_close_to_exact(dtype: str) -> None:
    q, k, v = (jnp.asarray(x, dtype) for x in (Q, K, V))
    mask = GENERATOR.random((LENGTH, 300)) > 0.3
    mask[:, 0] = True
    for name, keywords, seen in (
        ("all", {}, np.full((LENGTH, 300), True)),
        ("causal", {"causal": True}, np.tri(LENGTH, 300, dtype=bool)),
        ("mask", {"mask": jnp.asarray(mask)}, mask),
    ):
        ours = np.asarray(bi.attention(q, k, v, interpret=True, **keywords), np.float64)
        error = np.abs(ours - _exact(q, k, v, seen)).max()
        assert error < (3e-6 if dtype == "float32" else 1e-2), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_chunks_and_decode_have_the_same_bits(dtype: str) -> None:
    """A cache longer than it is filled, with NaN behind the end, as a server keeps it."""
    q, k, v = (np.asarray(jnp.asarray(x, dtype)) for x in (Q, K[:, :, :LENGTH], V[:, :, :LENGTH]))
    whole = bits(bi.attention(*map(jnp.asarray, (q, k, v)), causal=True, interpret=True))
    cache_k, cache_v = (np.full((B, KV, 600, SIZE), np.nan, x.dtype) for x in (k, v))
    cache_k[:, :, :LENGTH], cache_v[:, :, :LENGTH] = k, v
    for begin, end in ((0, 20), (20, LENGTH), (LENGTH - 1, LENGTH)):
        piece = bi.attention(
            jnp.asarray(q[:, :, begin:end]),
            jnp.asarray(cache_k),
            jnp.asarray(cache_v),
            causal=True,
            q_offsets=jnp.full((B,), begin),
            kv_lengths=jnp.full((B,), end),
            interpret=True,
        )
        assert (bits(piece) == whole[:, :, begin:end]).all()


def test_a_sequence_alone_and_in_a_batch() -> None:
    q, k, v = map(jnp.asarray, (Q[:, :, :1], K, V))
    lengths = jnp.asarray([280, 300])
    how = interpret_of("memory")
    both = bits(bi.attention(q, k, v, kv_lengths=lengths, interpret=how))
    one = bi.attention(q[:1], k[:1, :, :280], v[:1, :, :280], interpret=how)
    assert (bits(one)[0] == both[0]).all()


def test_a_query_that_sees_nothing_is_zero() -> None:
    out, lse = bi.attention(
        *map(jnp.asarray, (Q, K, V)),
        mask=jnp.zeros((LENGTH, 300), bool),
        with_lse=True,
        interpret=True,
    )
    assert not np.asarray(out).any()
    assert (np.asarray(lse) == -np.inf).all()


def test_gradients_are_those_of_plain_jax() -> None:
    q, k, v = (jnp.asarray(x[:1, :, :9]) for x in (Q, K, V))

    def ours(*a):
        return (bi.attention(*a, causal=True, interpret=True) ** 2).sum()

    def plain(*a):
        q, k, v = (x.swapaxes(1, 2) for x in a)
        return (jax.nn.dot_product_attention(q, k, v, is_causal=True) ** 2).sum()

    got, want = jax.grad(ours, (0, 1, 2))(q, k, v), jax.grad(plain, (0, 1, 2))(q, k, v)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(OpNotSupported, match="no multiple"):
        bi.attention(*map(jnp.asarray, (Q[:, :3], K, V)), interpret=True)
