"""What attention over sequences computes, in plain torch, one sequence at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from batch_invariant.ops.varlen_layout import Layout, Span, keys_of, queries_of, spans


class Part(NamedTuple):
    """One sequence, heads first: query [H, L, E], key [Hkv, S, E], value [Hkv, S, Ev].

    `offset` is the place of the first query among these keys.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    offset: int


def parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout
) -> Iterator[Part]:
    """Every sequence by itself. Lengths that are not on the CPU are copied there."""
    for b, row in enumerate(spans(query, key, layout).tolist()):
        span = Span(*row)
        q = queries_of(query, span, b)
        k, v = (keys_of(x, span, b, layout) for x in (key, value))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        yield Part(q, k, v, span.position - span.first)


def factor(query: torch.Tensor, scale: float | None) -> float:
    """What scores are multiplied by."""
    return 1 / math.sqrt(query.size(-1)) if scale is None else float(scale)


def capped(
    scores: torch.Tensor, soft_cap: float | None, tanh: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scores after the soft cap, and their derivative by those before it; None for one."""
    if soft_cap is None:
        return scores, None
    bent = tanh(scores / soft_cap)
    return bent * soft_cap, 1 - bent * bent


def seen(scores: torch.Tensor, offset: int, window: int | None) -> torch.Tensor:
    """Which keys take part in causal attention, [L, S] for scores [H, L, S]."""
    position = offset + torch.arange(scores.size(1), device=scores.device)[:, None]
    key = torch.arange(scores.size(2), device=scores.device)
    visible = key <= position
    return visible if window is None else visible & (key > position - window)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    left_pad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the logarithms of the denominators."""
    layout = Layout(cu_seqlens_q, cu_seqlens_k, seq_lens, left_pad, block_table)
    outputs, logs = [], []
    for part in parts(query, key, value, layout):
        repeat = part.query.size(0) // part.key.size(0)
        k, v = (x.repeat_interleave(repeat, 0) for x in (part.key, part.value))
        scores = capped(part.query @ k.mT * factor(query, scale), soft_cap, torch.tanh)[0]
        if causal:
            visible = seen(scores, part.offset, window)
            scores = torch.where(visible, scores, -torch.inf)
        if sinks is not None:
            extra = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:2], 1)
            scores = torch.cat([scores, extra], -1)
        alone = (scores == -torch.inf).all(-1, keepdim=True)
        lse = torch.where(alone, 0, scores).logsumexp(-1, keepdim=True)
        weights = torch.where(alone, 0, (torch.where(alone, 0, scores) - lse).exp())
        outputs.append((weights[..., : k.size(1)] @ v).transpose(0, 1))
        logs.append(torch.where(alone, -torch.inf, lse).squeeze(-1))
    if cu_seqlens_q is None:
        return torch.stack(outputs), torch.stack(logs)
    behind = query.size(0) - sum(len(out) for out in outputs)
    rest = value.new_zeros(behind, query.size(1), value.size(-1))
    nothing = logs[0].new_full((query.size(1), behind), -torch.inf)
    return torch.cat([*outputs, rest]), torch.cat([*logs, nothing], 1)
