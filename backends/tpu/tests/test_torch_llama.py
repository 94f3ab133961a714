"""The small Llama in torch, through CPU tensors: a row's bits alone, in batches to 64, padded."""

import pytest
import torch

from batch_invariant.ops.bits import mismatch
from torch_llama import VOCABULARY, Ours, Plain, forward, weights

TOKENS = torch.randint(0, VOCABULARY, (64, 7), generator=torch.Generator().manual_seed(3))
BATCHES = {torch.float32: (1, 2, 3, 8, 33), torch.bfloat16: (1, 5)}


def _varies(ops: Ours | Plain, dtype: torch.dtype) -> list[str]:
    """Batch sizes, plain and padded to 64 rows, at which a row differs from the batch of 64."""
    w = weights(dtype)
    whole = forward(ops, w, TOKENS)
    found = []
    for batch in BATCHES[dtype]:
        rows = TOKENS[-batch:]
        padded = torch.cat([rows, torch.zeros_like(TOKENS[batch:])])
        for name, tokens in {"plain": rows, "padded": padded}.items():
            if mismatch(forward(ops, w, tokens)[:batch], whole[-batch:]) is not None:
                found.append(f"{name} {batch}")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    assert _varies(Ours(), dtype) == []


def test_plain_torch_does_not_keep_them() -> None:
    assert _varies(Plain(), torch.float32)


def test_it_computes_what_plain_torch_does() -> None:
    w = weights(torch.float32)
    ours, plain = (forward(ops, w, TOKENS[:3]) for ops in (Ours(), Plain()))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
