"""The gradients of attention over sequences: of one sequence from that sequence alone.

Products and sums are the library's own, over the tokens of the sequence without its padding; so the
gradients of a sequence have the same bits dense, padded or packed, beside any others.
"""

from __future__ import annotations

from typing import Any

import torch

from batch_invariant.ops.elementwise import exp, tanh
from batch_invariant.ops.matmul import matmul
from batch_invariant.ops.reduce import sum
from batch_invariant.ops.register import NAMESPACE
from batch_invariant.ops.varlen_definition import Part, capped, factor, parts, seen
from batch_invariant.ops.varlen_layout import NAME, Layout, Span, keys_of, queries_of, spans


def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keeps what `backward` needs."""
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.options = inputs[9:]
    ctx.set_materialize_grads(False)


def backward(
    ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of query, key, value and sinks."""
    *inputs, out, lse = ctx.saved_tensors
    if inputs[-1] is not None:
        raise RuntimeError(
            f"{NAME}: there are no gradients through a paged cache, whose pages may be shared; "
            "give keys and values dense or packed, or call it under torch.no_grad()"
        )
    grad = torch.zeros_like(out) if grad is None else grad
    found = _gradients(grad, grad_lse, *inputs[:-1], out, lse, *ctx.options)
    found = found if inputs[3] is not None else (*found[:3], None)
    return (*found, *(None,) * (len(inputs) - 4 + len(ctx.options)))


@torch.library.custom_op(
    f"{NAMESPACE}::attention_gradients",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? sinks,"
        " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seq_lens, Tensor? left_pad,"
        " Tensor out, Tensor lse, bool causal, float? scale, int? window, float? soft_cap)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _gradients(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    left_pad: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One operator, because lengths are read here, which a traced graph could not do.

    On any device, by operators of the contracts. The gradient of absent sinks is empty.
    """
    layout = Layout(cu_seqlens_q, cu_seqlens_k, seq_lens, left_pad)
    g_query, g_key, g_value = (torch.zeros_like(x) for x in (query, key, value))
    g_sinks = [lse.new_zeros(0 if sinks is None else len(sinks))]
    sequences = zip(
        spans(query, key, layout).tolist(), parts(query, key, value, layout), strict=True
    )
    for b, (row, part) in enumerate(sequences):
        span = Span(*row)
        rows = slice(span.q_row, span.q_row + span.queries)
        mine = b if query.dim() == 4 else (slice(None), rows)
        q, k, v, s = _of_sequence(
            part,
            queries_of(out, span, b).transpose(0, 1),
            queries_of(grad, span, b).transpose(0, 1),
            lse[mine],
            None if grad_lse is None else grad_lse[mine],
            sinks,
            *options,
        )
        queries_of(g_query, span, b).copy_(q.transpose(0, 1))
        keys_of(g_key, span, b, layout).copy_(k.transpose(0, 1))
        keys_of(g_value, span, b, layout).copy_(v.transpose(0, 1))
        if s is not None:
            g_sinks.append(s)
    of_sinks = sum(torch.stack(g_sinks), 0)
    return g_query, g_key, g_value, of_sinks if sinks is None else of_sinks.to(sinks.dtype)


@_gradients.register_fake
def _(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, ...]:
    of_sinks = query.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return (*(torch.empty_like(x) for x in (query, key, value)), of_sinks)


def _of_sequence(
    part: Part,
    out: torch.Tensor,
    grad: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """In fp32, heads first; the gradient of the sinks is [H]."""
    query, key, value, out, grad = (x.to(lse.dtype) for x in (*part[:3], out, grad))
    groups = (key.size(0), query.size(0) // key.size(0))
    k, v = (x.repeat_interleave(groups[1], 0) for x in (key, value))
    by = factor(query, scale)
    scores, slope = capped(matmul(query, k.mT) * by, soft_cap, tanh)
    weights = torch.where(lse.isinf()[..., None], 0, exp(scores - lse[..., None]))
    if causal:
        weights = torch.where(seen(scores, part.offset, window), weights, 0)
    g_value = matmul(weights.mT, grad)
    delta = sum(grad * out, -1, True)
    if grad_lse is not None:  # the lse of a query that sees nothing is constant
        delta = delta - torch.where(lse.isinf(), 0, grad_lse)[..., None]
    g_scores = weights * (matmul(grad, v.mT) - delta)
    if slope is not None:
        g_scores = g_scores * slope
    g_query = matmul(g_scores, k) * by
    g_key = matmul(g_scores.mT, query) * by
    if groups[1] > 1:
        g_key = sum(g_key.unflatten(0, groups), 1)
        g_value = sum(g_value.unflatten(0, groups), 1)
    g_sinks = None
    if sinks is not None:
        share = torch.where(lse.isinf(), 0, exp(sinks.to(lse.dtype)[:, None] - lse))
        g_sinks = -sum(share * delta.squeeze(-1), -1)
    return g_query, g_key, g_value, g_sinks
