"""Contract of attention over sequences that are padded, packed, or kept in pages of a cache.

Order, for every query on its own: scores as fp32 sums over chunks of 16 of the head dimension, each
a serial chain, scaled, soft-capped; the exact maximum; exp; the denominator and the weighted sum of
values over blocks of 128 keys, by position in the sequence, ascending, in each a serial chain over
the keys that take part; the sink last; one division; one rounding. Keys that take no part add
nothing, whatever they hold. So a query has the same bits in prefill, in any chunk of a prefill, in
decode, behind a cached prefix, at any page size, packed or padded, beside any others. In float64
every sum is one chain.
"""

from __future__ import annotations

import math

import torch

from batch_invariant.guarantee import Guarantee
from batch_invariant.ops import varlen_cases, varlen_gradient
from batch_invariant.ops.contract import Op
from batch_invariant.ops.varlen_definition import attend
from batch_invariant.ops.varlen_layout import NAME, Layout, check_layout


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    left_pad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(query @ key.mT * scale) @ value for every sequence of a batch, by itself.

    query: [B, L, H, E], or packed [T, H, E] with `cu_seqlens_q` [B + 1], where sequence b has rows
    cu_seqlens_q[b] to cu_seqlens_q[b + 1]; rows behind the last give zeros.
    key, value, with Hkv heads that divide H, and any size of the value's heads:
      - dense [B, S, Hkv, E]; sequence b has keys left_pad[b] to seq_lens[b] (0 to S by default);
      - packed [Tk, Hkv, E] with `cu_seqlens_k` [B + 1];
      - pages [P, page size, Hkv, E] with `block_table` [B, n] and `seq_lens` [B]: key j of sequence
        b is row j % page size of page block_table[b, j // page size]. Pages may be shared.
    Blocks of 128 keys, on all backends, count from left_pad[b], from cu_seqlens_k[b] or from row 0.
    So whoever drops keys drops whole blocks, or puts others in their place that `window` hides.
    causal: the last query of a sequence stands at its last key, and sees the keys up to its own.
    window: with `causal`, a query sees its own key and the window - 1 before it.
    soft_cap: a score s becomes soft_cap * tanh(s / soft_cap).
    sinks: [H], one more score in the denominator, without a value.

    Returns [B, L, H, Ev] or [T, H, Ev] in the query's dtype; with `return_lse` also the logarithm
    of the denominator, sink included, in fp32: [B, H, L] or [H, T]. A query that sees nothing gives
    zeros, and -inf if it has no sink.

    Lengths and pages are int32 or int64. Those on the CPU are checked before anything is computed.
    To read those on another device would make the program wait for it, so a kernel there must keep
    within the tensors whatever the lengths say; the backward pass does read them.
    Gradients flow from both results to query, key, value and sinks, not through pages. The gradient
    of a key is the sum over its own sequence, so it does not depend on the others.

    Raises RuntimeError where arguments do not fit together.

    Source: Vaswani et al., Attention Is All You Need, 2017; Kwon et al., Efficient Memory
    Management for Large Language Model Serving with PagedAttention, 2023 (pages); Beltagy et al.,
    Longformer, 2020 (window); Gemma Team, Gemma 2, 2024 (soft cap); Xiao et al., Efficient
    Streaming Language Models with Attention Sinks, 2023.
    """
    layout = Layout(cu_seqlens_q, cu_seqlens_k, seq_lens, left_pad, block_table)
    out: tuple[torch.Tensor, torch.Tensor] = torch.ops.batch_invariant.attention.default(
        query, key, value, sinks, *layout, causal, scale, window, soft_cap
    )
    return out if return_lse else out[0]


def check_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    layout: Layout,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
) -> None:
    """Raises unless shapes, dtypes and options fit together; looks at no tensor's values."""
    check_layout(query, key, layout)
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(
            f"{NAME}: expected one dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if key.shape[:-1] != value.shape[:-1] or query.size(-1) != key.size(-1):
        raise RuntimeError(f"{NAME}: head or key sizes differ: {shapes}")
    if not key.size(-2) or query.size(-2) % key.size(-2):
        raise RuntimeError(f"{NAME}: query heads must be a multiple of the key heads: {shapes}")
    if sinks is not None:
        if sinks.shape != (query.size(-2),):
            raise RuntimeError(
                f"{NAME}: sinks must be [{query.size(-2)}], one for each query head, got "
                f"{list(sinks.shape)}"
            )
        if sinks.dtype not in (query.dtype, torch.float32):
            raise RuntimeError(
                f"{NAME}: expected sinks of dtype {query.dtype} or float32, got {sinks.dtype}"
            )
    if window is not None and (window < 1 or not causal):
        raise RuntimeError(
            f"{NAME}: a window counts the keys up to the query's own: it must be at least 1 and "
            f"needs causal=True; got window={window}, causal={causal}"
        )
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise RuntimeError(f"{NAME}: soft_cap must be positive and finite, got {soft_cap}")


def _fake(
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
    layout = Layout(cu_seqlens_q, cu_seqlens_k, seq_lens, left_pad, block_table)
    check_arguments(query, key, value, sinks, layout, causal, window, soft_cap)
    *batch, length, heads, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(*batch, length, heads, value.size(-1))
    return out, query.new_empty(*batch, heads, length, dtype=wide)


OPS = (
    Op(
        name=NAME,
        schema=(
            "(Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor? cu_seqlens_q,"
            " Tensor? cu_seqlens_k, Tensor? seq_lens, Tensor? left_pad, Tensor? block_table,"
            " bool causal, float? scale, int? window, float? soft_cap) -> (Tensor, Tensor)"
        ),
        fake=_fake,
        reference=attend,
        cases=varlen_cases.CASES,
        batch_axes=varlen_cases.BATCH_AXES,
        out_axes=(0, 0),
        level=Guarantee.SCHEDULE,
        schedule=varlen_cases.cuts,
        any_size=varlen_cases.any_size,
        error_bound=varlen_cases.error_bound,
        probe=varlen_cases.PROBE,
        setup_context=varlen_gradient.save,
        backward=varlen_gradient.backward,
    ),
)
