"""scaled_dot_product_attention on CPU: one native kernel; products of matrices for float64."""

from __future__ import annotations

import math
import struct
from functools import cache
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.cpu import native
from batch_invariant.cpu.matmul import product
from batch_invariant.errors import OpNotSupported
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.attention import KEY_BLOCK, check_attention, expanded_heads
from batch_invariant.ops.contract import FLOATS
from batch_invariant.order import chunked, serial

_CODE = {getattr(torch, name): code for name, code in native.DTYPES.items()}
_NO_MASK, _BOOL_MASK, _ADDITIVE_MASK = range(3)
# AttentionArgs of native/attention.cpp
_pack = struct.Struct("=8qQ3qQ3qQ3q2qQ4qQ3qQ3q2qd").pack


@cache
def _entry() -> Any:
    return native.library().bi_attention


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if query.dtype not in (*FLOATS, torch.float64):
        raise OpNotSupported(f"attention on CPU takes floating point tensors; got {query.dtype}")
    factor = 1 / math.sqrt(query.size(-1)) if scale is None else float(scale)
    q, k, v = _four(query, key, value, enable_gqa)
    mask = None
    if attn_mask is not None:
        mask = attn_mask.expand(*query.shape[:-1], key.size(-2))
        mask = _four_of(mask)
    if query.dtype == torch.float64:
        out, lse = _float64(q, k, v, mask, is_causal, factor)
    else:
        out, lse = _native(q, k, v, mask, is_causal, factor)
    lead = _lead(query, key, value, enable_gqa)
    return out.reshape(*lead, *out.shape[-2:]), lse.reshape(*lead, lse.size(-1))


def _lead(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[int, ...]:
    """Every dimension of the result before [L, Ev]."""
    if enable_gqa:
        return tuple(query.shape[:-2])
    return tuple(torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2]))


def _four_of(x: torch.Tensor) -> torch.Tensor:
    """[batch, heads, rows, columns] of a tensor of any rank from 2."""
    if x.dim() == 4:
        return x
    return x[(None,) * (4 - x.dim())] if x.dim() < 4 else x.flatten(0, -4)


def _four(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> list[torch.Tensor]:
    lead = _lead(query, key, value, enable_gqa)
    found = []
    for x in (query, key, value):
        heads = (*lead[:-1], x.size(-3)) if enable_gqa else lead
        x = _four_of(x.expand(*heads, *x.shape[-2:]))
        found.append(x if x.stride(-1) == 1 else x.contiguous())
    return found


def _native(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, rows, size = q.shape
    kv_heads, keys = k.shape[1:3]
    out = torch.empty(batch, rows, heads, v.size(3), dtype=q.dtype).transpose(1, 2)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32)
    masks: tuple[int, ...] = (_NO_MASK, 0, 0, 0, 0, 0, 0)
    if mask is not None:
        kind = _BOOL_MASK if mask.dtype == torch.bool else _ADDITIVE_MASK
        masks = (kind, _CODE.get(mask.dtype, 0), mask.data_ptr(), *mask.stride())
    status = _entry()(
        _pack(
            _CODE[q.dtype], batch, heads, kv_heads, rows, keys, size, v.size(3),
            q.data_ptr(), *q.stride()[:3],
            k.data_ptr(), *k.stride()[:3],
            v.data_ptr(), *v.stride()[:3],
            *masks,
            out.data_ptr(), *out.stride()[:3],
            lse.data_ptr(), *lse.stride(),
            is_causal, torch.get_num_threads(), factor,
        )
    )  # fmt: skip
    if status:
        raise OpNotSupported(f"the native attention refused the call: {native.STATUS[status]}")
    return out, lse


def _float64(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chain over the head size and one over the keys in fp64, with torch's exp and log."""
    k, v = expanded_heads(q, k, v)
    rows, keys = q.size(2), k.size(2)
    scores = product(q.flatten(0, 1), k.flatten(0, 1).mT).view(*q.shape[:2], rows, keys) * factor
    if is_causal:
        mask = torch.ones(rows, keys, dtype=torch.bool).tril()
    if mask is not None:
        keep = mask if mask.dtype == torch.bool else mask != -torch.inf
        scores = scores if mask.dtype == torch.bool else scores + mask
        scores = torch.where(keep, scores, -torch.inf)
    top = scores.amax(-1, keepdim=True) if keys else scores.new_full((*scores.shape[:-1], 1), 0)
    top = torch.where(top == -torch.inf, 0, top)
    weights = torch.ops.batch_invariant.exp.default(scores - top).flatten(0, 1)
    total = product(weights, weights.new_ones(len(weights), keys, 1))
    out = torch.where(total == 0, 0, product(weights, v.flatten(0, 1)) / total)
    lse = torch.ops.batch_invariant.log.default(total.view(*q.shape[:3])) + top.squeeze(-1)
    out = out.view(*q.shape[:3], v.size(3))
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


KERNELS = {
    "scaled_dot_product_attention": Kernel(
        fn=_attention,
        guarantee=Guarantee.SCHEDULE,
        dtypes=frozenset((*FLOATS, torch.float64)),
        order={**dict.fromkeys(FLOATS, chunked(KEY_BLOCK, serial())), torch.float64: serial()},
        portable=frozenset(FLOATS),
    )
}
