"""A whole model, jitted: a row's bits alone, in batches to 64, and padded to the next bucket."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batch_invariant_tpu.interpreter_check import bits
from llama import VOCABULARY, Ours, Plain, forward, weights

TOKENS = np.random.default_rng(3).integers(0, VOCABULARY, (64, 7))
BATCHES = {"float32": (1, 2, 3, 8, 64), "bfloat16": (1, 64)}


def _varies(ops, dtype: str) -> list[str]:
    """Batch sizes, plain and padded, at which a row differs from the batch of 64."""
    w = weights(dtype)
    run = jax.jit(lambda tokens: forward(ops, w, tokens))
    whole = bits(run(jnp.asarray(TOKENS)))
    found = []
    for batch in BATCHES[dtype]:
        rows = TOKENS[-batch:]
        padded = np.concatenate([rows, np.zeros_like(TOKENS[: -batch % 8])])
        for name, tokens in {"alone": rows, "padded": padded}.items():
            if name == "alone" and batch == 64:
                continue
            if (bits(run(jnp.asarray(tokens)))[:batch] != whole[-batch:]).any():
                found.append(f"{name} {batch}")
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_in_every_batch(dtype: str) -> None:
    assert _varies(Ours(), dtype) == []


def test_plain_jax_does_not_keep_them() -> None:
    assert _varies(Plain(), "float32")
