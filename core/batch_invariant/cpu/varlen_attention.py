"""Attention over sequences on CPU: the native kernel, which follows pages; float64 by products."""

from __future__ import annotations

import struct
from functools import cache
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.cpu import native
from batch_invariant.cpu.matmul import product
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.attention import KEY_BLOCK
from batch_invariant.ops.contract import FLOATS
from batch_invariant.ops.varlen_attention import check_arguments
from batch_invariant.ops.varlen_definition import Part, capped, factor, parts, seen
from batch_invariant.ops.varlen_layout import (
    Layout,
    Span,
    capacity,
    check_values,
    queries_of,
    spans,
)
from batch_invariant.order import chunked, serial

_CODE = {getattr(torch, name): code for name, code in native.DTYPES.items()}
# SequencesArgs of native/attention.cpp
_pack = struct.Struct("=8qQ3qQ3qQ3q2qQ4qQ3qQ3q2qd2q3qQd").pack


@cache
def _entry() -> Any:
    return native.library().bi_attention_of_sequences


def _attention(
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
    if query.dtype not in (*FLOATS, torch.float64):
        raise OpNotSupported(f"attention on CPU takes floating point tensors; got {query.dtype}")
    check_values(query, key, layout)
    *batch, length, heads, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    # Rows of packed queries that belong to no sequence stay as they are here.
    shape = (*batch, length, heads, value.size(-1))
    out = query.new_zeros(shape) if cu_seqlens_q is not None else query.new_empty(shape)
    lse = query.new_full((*batch, heads, length), -torch.inf, dtype=wide)
    by = factor(query, scale)
    if query.dtype == torch.float64:
        for b, (row, part) in enumerate(
            zip(spans(query, key, layout).tolist(), parts(query, key, value, layout), strict=True)
        ):
            span = Span(*row)
            found = _float64(part, sinks, causal, by, window, soft_cap)
            queries_of(out, span, b).copy_(found[0].transpose(0, 1))
            rows = slice(span.q_row, span.q_row + span.queries)
            (lse[b] if query.dim() == 4 else lse[:, rows]).copy_(found[1])
    else:
        _native(query, key, value, sinks, layout, causal, by, window, soft_cap, out, lse)
    return out, lse


def _native(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    layout: Layout,
    causal: bool,
    by: float,
    window: int | None,
    soft_cap: float | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    sequences = spans(q, k, layout)
    table, sinks = layout.block_table, None if sinks is None else sinks.float().contiguous()
    if table is not None:
        table = table.int().contiguous()
    most_queries = q.size(1) if q.dim() == 4 else _most(sequences, 1)
    most_keys = _most(sequences, 5) if layout.cu_seqlens_k is not None else capacity(k, layout)
    status = _entry()(
        _pack(
            _CODE[q.dtype], len(sequences), q.size(-2), k.size(-2), most_queries, most_keys,
            q.size(-1), v.size(-1),
            q.data_ptr(), *_strides(q), k.data_ptr(), *_strides(k), v.data_ptr(), *_strides(v),
            *(0,) * 7,
            out.data_ptr(), *_strides(out),
            lse.data_ptr(), lse.stride(0) if lse.dim() == 3 else 0, lse.stride(-2), lse.stride(-1),
            causal, torch.get_num_threads(), by,
            sequences.data_ptr(),
            *((0, 0, 0) if table is None else (table.data_ptr(), table.size(1), k.size(1))),
            window or 0, 0 if sinks is None else sinks.data_ptr(), soft_cap or 0.0,
        )
    )  # fmt: skip
    if status:
        raise OpNotSupported(f"the native attention refused the call: {native.STATUS[status]}")


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of batch (or page), head and row of [B, L, H, E], or [T, H, E]."""
    return (x.stride(0) if x.dim() == 4 else 0, x.stride(-2), x.stride(-3))


def _most(sequences: torch.Tensor, column: int) -> int:
    return max(sequences[:, column].tolist(), default=0)


def _float64(
    part: Part,
    sinks: torch.Tensor | None,
    causal: bool,
    by: float,
    window: int | None,
    soft_cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence, serial products in fp64, with torch's exp, log and tanh."""
    own = torch.ops.batch_invariant
    repeat = part.query.size(0) // part.key.size(0)
    k, v = (x.repeat_interleave(repeat, 0) for x in (part.key, part.value))
    scores = product(part.query, k.mT) * by
    scores = capped(scores, soft_cap, own.tanh.default)[0]
    if causal:
        scores = torch.where(seen(scores, part.offset, window), scores, -torch.inf)
    top = scores.new_full((*scores.shape[:2], 1), -torch.inf)
    if k.size(1):
        top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.double()[:, None, None]
        top = torch.maximum(top, sinks)
    top = torch.where(top == -torch.inf, 0, top)
    weights = own.exp.default(scores - top)
    total = product(weights, weights.new_ones(len(weights), weights.size(2), 1))
    if sinks is not None:
        total = total + own.exp.default(sinks - top)
    out = torch.where(total == 0, 0, product(weights, v) / total)
    return out, (own.log.default(total) + top).squeeze(-1)


KERNELS = {
    "attention": Kernel(
        fn=_attention,
        guarantee=Guarantee.SCHEDULE,
        dtypes=frozenset((*FLOATS, torch.float64)),
        order={**dict.fromkeys(FLOATS, chunked(KEY_BLOCK, serial())), torch.float64: serial()},
        portable=frozenset(FLOATS),
    )
}
