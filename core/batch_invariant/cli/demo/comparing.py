"""Two decodings of one prompt, compared bit for bit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Decoded:
    """What greedy decoding of one prompt gave, up to and including its end-of-text token."""

    tokens: torch.Tensor  # [steps], int64
    logits: torch.Tensor  # [steps, vocabulary], float32: what `generate` hands out


@dataclass(frozen=True)
class Difference:
    """How a prompt's decoding in a batch differs from its decoding alone."""

    logits: bool  # the bits of the logits differ at some step
    token_step: int | None  # the first step with another token, or None
    largest: float  # largest |difference| of logits that follow the same tokens; NaN counts as inf


def compare(alone: Decoded, batched: Decoded) -> Difference:
    """Two decodings of one prompt: integer views of the bits, no tolerance.

    Logits are compared for as long as the tokens before them agree; from the first other token on
    the decodings are of different texts, and count as different.
    """
    steps = min(len(alone.tokens), len(batched.tokens))
    other = (alone.tokens[:steps] != batched.tokens[:steps]).nonzero()
    token_step = int(other[0]) if len(other) else None
    if token_step is None and len(alone.tokens) != len(batched.tokens):
        token_step = steps
    shared = steps if token_step is None else min(token_step + 1, steps)
    ours, theirs = alone.logits[:shared], batched.logits[:shared]
    changed = ours.view(torch.int32) != theirs.view(torch.int32)
    gap = (ours[changed].double() - theirs[changed].double()).abs().nan_to_num(nan=math.inf)
    return Difference(
        logits=bool(changed.any()) or token_step is not None,
        token_step=token_step,
        largest=float(gap.max()) if gap.numel() else 0.0,
    )
