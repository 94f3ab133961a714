"""Sampling keyed by request inside generate() of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from batch_invariant.errors import BatchInvariantError
from batch_invariant.ops.sample import PerRow, sample


class SeededSampling:
    """A logits processor that draws every request's tokens from its own seed.

    model.generate(**inputs, do_sample=False, logits_processor=[SeededSampling(seeds, mask)])

    It leaves nothing but the drawn token, which greedy search then takes; so it comes last, and
    `output_scores` shows that token alone. The draws are `sample`'s, at positions counted from the
    request's own first token: the same alone, in a batch, at any padding, and when a request is
    taken up again after some of its tokens.

    seeds: one integer for each row, as a sequence or a tensor.
    attention_mask: that of the prompts, [rows, length], where they are padded on the left.
    temperature, top_k, top_p, min_p: as `sample` takes them, for all rows or for each.

    Raises ValueError where the rows of the batch are not those of the seeds, as with beams, or
    where the padding is not on the left; BatchInvariantError where a row has nothing to draw from.
    """

    supports_continuous_batching = False  # its rows change places

    def __init__(
        self,
        seeds: Sequence[int] | torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        temperature: PerRow = 1.0,
        top_k: torch.Tensor | int = 0,
        top_p: PerRow = 1.0,
        min_p: PerRow = 0.0,
    ) -> None:
        self._seeds = torch.as_tensor(seeds)
        if self._seeds.dim() != 1:
            raise ValueError(f"SeededSampling takes one seed a row, got {list(self._seeds.shape)}")
        self._padding = torch.zeros(len(self._seeds), dtype=torch.int64)
        if attention_mask is not None:
            self._padding = _left_padding(attention_mask, len(self._seeds))
        self._filters: dict[str, Any] = {
            **{"temperature": temperature, "top_k": top_k},
            **{"top_p": top_p, "min_p": min_p},
        }

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """-inf everywhere but at the column that each row draws, which gets 0."""
        if len(scores) != len(self._seeds):
            raise ValueError(
                f"SeededSampling has {len(self._seeds)} seeds, and generate() asks for "
                f"{len(scores)} rows; beams and num_return_sequences copy rows: give each its seed"
            )
        self._seeds = self._seeds.to(scores.device)
        self._padding = self._padding.to(scores.device)
        positions = input_ids.size(1) - self._padding
        drawn = sample(scores, self._seeds, positions, **self._filters)
        if bool((drawn < 0).any()):
            row = int((drawn < 0).nonzero()[0])
            raise BatchInvariantError(
                f"SeededSampling: row {row} has nothing to draw from: a NaN among its logits, or "
                "none above -inf, or a parameter out of range"
            )
        columns = torch.arange(scores.size(1), device=scores.device)
        out: torch.Tensor = torch.where(columns == drawn[:, None], 0.0, -torch.inf).to(scores.dtype)
        return out


def _left_padding(mask: torch.Tensor, rows: int) -> torch.Tensor:
    """How many places of each row come before its first token."""
    if mask.dim() != 2 or len(mask) != rows:
        raise ValueError(
            f"SeededSampling: the attention mask has shape {list(mask.shape)}; expected "
            f"[{rows}, length], one row for each seed"
        )
    there = mask != 0
    if bool((there[:, :-1] & ~there[:, 1:]).any()) or not bool(there[:, -1:].all()):
        raise ValueError(
            "SeededSampling: a prompt is padded on the right or inside; generate() needs "
            "tokenizer.padding_side = 'left'"
        )
    return (~there).sum(1)
