"""scaled_dot_product_attention on Ascend: products, an exact maximum, composed exp and log.

Composed of `product` and `row_sum`, in fp32 until the one rounding, so it has their tiers. A key
that no query may see adds nothing, whatever it holds.
"""

from __future__ import annotations

import math

import torch

from batch_invariant.backend import Kernel
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.attention import check_attention, expanded_heads
from batch_invariant_ascend import product as products
from batch_invariant_ascend.dtypes import DTYPES, check_dtype
from batch_invariant_ascend.explog import exp, log
from batch_invariant_ascend.product import product
from batch_invariant_ascend.row_sum import row_sum


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
    k, v = expanded_heads(query, key, value) if enable_gqa else (key, value)
    lead = torch.broadcast_shapes(query.shape[:-2], k.shape[:-2], v.shape[:-2])
    length, keys = query.size(-2), key.size(-2)
    q, k, v = (t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (query, k, v))
    keep = added = None
    if is_causal:
        keep = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril()
        keep = keep.expand(len(q), length, keys)
    elif attn_mask is not None:
        mask = attn_mask.expand(*lead, length, keys).reshape(-1, length, keys)
        keep, added = (mask, None) if mask.dtype == torch.bool else (None, mask.float())
    out, lse = attend(q, k, v, keep, added, factor)
    out = out.to(query.dtype).view(*lead, length, v.size(-1))
    if lead:  # in memory [..., L, H, Ev], as the contract says
        out = out.transpose(-2, -3).contiguous().transpose(-2, -3)
    return out, lse.view(*lead, length)


def kernels() -> dict[str, Kernel]:
    """By operator name."""
    chosen = products.choice()
    return {
        "scaled_dot_product_attention": Kernel(
            fn=_attention,
            guarantee=Guarantee.BATCH,
            dtypes=DTYPES,
            order=products.order(),
            **chosen.shown,
        )
    }
