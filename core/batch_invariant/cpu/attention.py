"""scaled_dot_product_attention on CPU."""

from __future__ import annotations

from typing import Any

import torch

from batch_invariant.backend import Kernel
from batch_invariant.cpu.matmul import product
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops.attention import check_attention
from batch_invariant.ops.contract import FLOATS


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: Any = None,
    enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_attention(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if enable_gqa and query.size(-3) != key.size(-3):
        r = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(r, -3), value.repeat_interleave(r, -3)
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    q, k, v = (
        t.to(wide).expand(*batch, *t.shape[-2:]).reshape(-1, *t.shape[-2:])
        for t in (query, key, value)
    )
    scores = product(q, k.mT) * (query.size(-1) ** -0.5 if scale is None else scale)
    scores = scores.view(*batch, *scores.shape[-2:])
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = torch.where(attn_mask, scores, -torch.inf)
        else:
            scores = scores + attn_mask
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    p = torch.ops.batch_invariant.exp.default(scores - top)
    flat = p.reshape(-1, *p.shape[-2:])
    total = product(flat, torch.ones(len(flat), flat.size(2), 1, dtype=wide))
    out = product(flat, v) / total
    lse = torch.ops.batch_invariant.log.default(total.view(*batch, -1)) + top.squeeze(-1)
    return out.view(*batch, *out.shape[-2:]).to(query.dtype), lse


KERNELS = {
    "scaled_dot_product_attention": Kernel(
        fn=_attention,
        guarantee=Guarantee.BATCH,
        dtypes=frozenset((*FLOATS, torch.float64)),
        order="serial",
    )
}
