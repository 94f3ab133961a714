"""scaled_dot_product_attention on Ascend: the vendor's fused kernel, or composed.

Tiers A and B take the calls of `fused_attention.takes`. Everything else is composed of `product`
and `row_sum`, an exact maximum and composed exp and log, in fp32 until the one rounding, so it has
their tiers. A key that no query may see adds nothing, whatever it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.attention import check_attention, expanded_heads
from batch_invariant.order import Order
from batch_invariant_ascend import fused_attention
from batch_invariant_ascend import product as products
from batch_invariant_ascend.dtypes import DTYPES, check_dtype
from batch_invariant_ascend.explog import exp, log
from batch_invariant_ascend.product import product
from batch_invariant_ascend.row_sum import row_sum
from batch_invariant_ascend.tiers import Tier


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor | None,
    added: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of [B, L, E] over [B, S, E] and [B, S, Ev]; [B, L, Ev] and log-sum-exp, both fp32.

    keep: bool [B, L, S], True where a key takes part; added: fp32, added to the scores; or None.
    """
    scores = product(query, key.mT, torch.float32) * scale
    if added is not None:
        scores = scores + added
        keep = scores != -torch.inf if keep is None else keep & (scores != -torch.inf)
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
        value = value.masked_fill(~keep.any(1)[..., None], 0.0)
    keys = key.size(1)
    top = scores.amax(-1, keepdim=True) if keys else scores.new_zeros(*scores.shape[:-1], 1)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = exp(scores - top)
    total = row_sum(weights.flatten(0, 1)).view(*scores.shape[:-1], 1)
    out = product(weights, value.float(), torch.float32) / total
    return out.masked_fill(total == 0, 0.0), (log(total) + top).squeeze(-1)


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
    check_dtype("scaled_dot_product_attention", query, key, value)
    factor = 1 / math.sqrt(query.size(-1)) if scale is None else float(scale)
    chosen = fused_attention.choice()
    if chosen.tier is not Tier.D and fused_attention.takes(
        query, key, value, attn_mask, enable_gqa
    ):
        return _fused(chosen.fn, query, key, value, attn_mask, is_causal, factor, enable_gqa)
    k, v = expanded_heads(query, key, value) if enable_gqa else (key, value)
    lead = torch.broadcast_shapes(query.shape[:-2], k.shape[:-2], v.shape[:-2])
    length, keys = query.size(-2), key.size(-2)
    count = math.prod(lead)
    q, k, v = (t.expand(*lead, *t.shape[-2:]).reshape(count, *t.shape[-2:]) for t in (query, k, v))
    keep = added = None
    if is_causal:
        keep = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril()
        keep = keep.expand(len(q), length, keys)
    elif attn_mask is not None:
        mask = attn_mask.expand(*lead, length, keys).reshape(count, length, keys)
        keep, added = (mask, None) if mask.dtype == torch.bool else (None, mask.float())
    out, lse = attend(q, k, v, keep, added, factor)
    return _laid_out(out.to(query.dtype), lead), lse.view(*lead, length)


def _laid_out(out: torch.Tensor, lead: Sequence[int]) -> torch.Tensor:
    """The result [..., L, Ev], in memory [..., L, H, Ev], as the contract says."""
    out = out.reshape(*lead, *out.shape[-2:])
    return out.transpose(-2, -3).contiguous().transpose(-2, -3) if lead else out


def _fused(
    fn: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    factor: float,
    enable_gqa: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The call with [B, N, L, D]: a tensor without heads has one head and not one sequence."""
    lead = tuple(query.shape[:-2])
    if not enable_gqa:
        lead = tuple(torch.broadcast_shapes(lead, key.shape[:-2], value.shape[:-2]))
    batch = lead if len(lead) < 2 and not enable_gqa else lead[:-1]
    heads = lead[len(batch) :]

    def four(x: torch.Tensor) -> torch.Tensor:
        own = x.shape[-3:-2] if enable_gqa else heads
        x = x.expand(*batch, *own, *x.shape[-2:])
        return x.reshape(math.prod(batch), *(own or (1,)), *x.shape[-2:])

    keep = None
    if attn_mask is not None:
        one = (1,) * len(heads)
        keep = attn_mask.expand(*batch, *one, query.size(-2), key.size(-2))
        keep = keep.reshape(math.prod(batch), 1, *keep.shape[-2:])
    out, lse = fused_attention.attend(
        fn, four(query), four(key), four(value), keep, is_causal, factor
    )
    return _laid_out(out, lead), lse.reshape(*lead, query.size(-2))


def kernels() -> dict[str, Kernel]:
    """By operator name."""
    composed, chosen = products.choice(), fused_attention.choice()
    order: Order | dict[torch.dtype, Order] = products.order()
    source: str | dict[torch.dtype, str] = _composed_source(composed.tier)
    if chosen.tier is not Tier.D:
        by_fused = f"{chosen.tier.value}; masks with values, other head sizes: {source}"
        source = dict.fromkeys(DTYPES, source) | dict.fromkeys(fused_attention.DTYPES, by_fused)
        order = dict.fromkeys(DTYPES, order) | dict.fromkeys(
            fused_attention.DTYPES, fused_attention.ORDER[chosen.tier]
        )
    return {
        "scaled_dot_product_attention": Kernel(
            fn=_attention,
            guarantee=Guarantee.BATCH,
            dtypes=DTYPES,
            order=order,
            source=source,
            better=tuple(dict.fromkeys((*chosen.better, *composed.better))),
        )
    }


def _composed_source(tier: Tier) -> str:
    return tier.value if tier is Tier.D else f"{tier.value}, composed of products"
