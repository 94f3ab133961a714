"""The vendor's npu_fused_infer_attention_score, and scaled_dot_product_attention as one call of it.

A call of scaled_dot_product_attention is prefill or decode, never both: its sequences have one
length. Whether the vendor's kernel takes a call depends on the dtype, the heads and the kind of
mask, which all rows share, and never on the batch. What it does not take is composed, as in
`attention.py`: fp32, masks with values or for single heads, heads of other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from batch_invariant.errors import OpNotSupported
from batch_invariant.order import Order, undeclared
from batch_invariant_ascend import admission
from batch_invariant_ascend.switches import check_level_3
from batch_invariant_ascend.tiers import Candidate, Choice, Tier, ascendc, choose, need_level_3

Tensor = torch.Tensor
NAME = "npu_fused_infer_attention_score"
DTYPES = (torch.bfloat16, torch.float16)
ORDER: dict[Tier, Order] = {
    Tier.A: undeclared("CANN's own, batch consistent"),
    Tier.B: undeclared("AscendC's own"),
}
RENAMED = {
    "actual_seq_qlen": "actual_seq_lengths",
    "actual_seq_kvlen": "actual_seq_lengths_kv",
    "num_query_heads": "num_heads",
    "softmax_scale": "scale",
    "return_softmax_lse": "softmax_lse_flag",
}
"""Keywords of `_v2`, by what they are called in the first version."""

# Limits of the vendor's documentation, for Atlas A2 and A3.
_MOST_HEADS, _MOST_HEADS_A_KEY, _MOST_SIZE, _SIZE_UNIT = 256, 64, 512, 16
_TRIANGLE = 2048


def native(version: str) -> Callable[..., Any]:
    """torch_npu's own kernel, under batch consistency; version is "" or "_v2"."""
    need_level_3()
    kernel = torch.library.get_kernel(f"npu::{NAME}{version}", "PrivateUse1")
    keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)

    def run(*args: Any, **kwargs: Any) -> Any:
        check_level_3()
        return kernel.call_boxed(keyset, *args, **kwargs)

    return run


def batch_invariant(version: str) -> Callable[..., Any]:
    """AscendC's kernel, which has the first version's keywords; `_v2` is translated."""
    fn: Callable[..., Any] = ascendc(f"{NAME}_batch_invariant")
    return _renamed(fn) if version else fn


def is_given(value: Any) -> bool:
    """Whether an argument asks for something: None, zero and empty lists do not."""
    return isinstance(value, Tensor) or bool(value)


def _renamed(fn: Any) -> Callable[..., Any]:
    known = {argument.name for argument in fn.default._schema.arguments}

    def run(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Any:
        words = {RENAMED.get(n, n): given for n, given in keywords.items() if is_given(given)}
        if unknown := sorted(set(words) - known):
            raise OpNotSupported(
                f"{NAME}_v2 with {', '.join(unknown)}: AscendC's batch_invariant_ops has the first "
                "version alone, which does not know it; leave it out, or install CANN >= 9.2.0"
            )
        return fn(query, key, value, **words)

    return run


@cache
def choice() -> Choice:
    """The tier of scaled_dot_product_attention in bf16 and fp16; D if it has to be composed."""
    return choose(
        "scaled_dot_product_attention",
        (
            Candidate(Tier.A, lambda: native(""), _varies),
            Candidate(Tier.B, lambda: batch_invariant(""), _varies),
            Candidate(Tier.D, lambda: _composed),
        ),
    )


def _composed(*_: Any, **__: Any) -> Any:
    raise OpNotSupported(f"{NAME} has no batch-invariant kernel here")


def takes(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, gqa: bool) -> bool:
    """Whether the vendor's kernel takes this call of scaled_dot_product_attention."""
    heads = query.size(-3) if query.dim() > 3 or gqa else 1
    kv_heads = key.size(-3) if gqa else heads
    size = query.size(-1)
    return (
        query.dtype in DTYPES
        and 0 not in (*query.shape, *key.shape)
        and value.size(-1) == size
        and size % _SIZE_UNIT == 0
        and size <= _MOST_SIZE
        and heads <= min(_MOST_HEADS, _MOST_HEADS_A_KEY * kv_heads)
        and (attn_mask is None or (attn_mask.dtype == torch.bool and _alike(attn_mask, heads)))
    )


def _alike(attn_mask: Tensor, heads: int) -> bool:
    """Whether a mask is the same for all heads, as the vendor's is."""
    return heads == 1 or attn_mask.dim() < 3 or attn_mask.size(-3) == 1


def attend(
    fn: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of [B, N, L, D] over [B, Nkv, S, D]; [B, N, L, D], and log-sum-exp [B, N, L].

    keep: bool [B, 1, L, S], True where a key takes part, or None. is_causal: the diagonal begins
    top left. A row without keys is zero, and a key that no row sees adds nothing whatever it holds.
    """
    words: dict[str, Any] = {
        "num_heads": query.size(1),
        "num_key_value_heads": key.size(1),
        "scale": scale,
        "input_layout": "BNSD",
        "softmax_lse_flag": True,
    }
    if is_causal:
        key, value = (t[:, :, : query.size(2)] for t in (key, value))
        if query.size(2) > 1:
            words |= {"sparse_mode": 2, "atten_mask": _triangle(query.device)}
    elif keep is not None:
        unseen = ~keep.any(-2)[..., None]
        key, value = (t.masked_fill(unseen, 0) for t in (key, value))
        words["atten_mask"] = (~keep).contiguous()
    out, lse = fn(query.contiguous(), key.contiguous(), value.contiguous(), **words)
    if keep is not None:
        # The kernel corrects such rows for prefill alone, and only where it is asked to.
        blind = ~keep.any(-1, keepdim=True)
        out, lse = out.masked_fill(blind, 0), lse.masked_fill(blind, -torch.inf)
    return out, lse.squeeze(-1)


@cache
def _triangle(device: torch.device) -> Tensor:
    """The mask that stands for every causal one: True above the diagonal."""
    return torch.ones(_TRIANGLE, _TRIANGLE, dtype=torch.bool, device=device).triu(1)


_KINDS = ((17, 17, False), (5, 150, True), (1, 150, False), (1, 150, True))
"""Tokens, keys and whether some are masked: prefill and decode."""


def _varies(fn: Callable[..., Any]) -> str | None:
    """Batches of sequences against parts of them."""
    for dtype in DTYPES:
        for length, keys, masked in _KINDS:
            # Pairs that cancel lie along the keys, since it is over them that values are added.
            shapes = ((4, length, 64), (2, keys, 64), (2, 64, keys))
            parts = [
                admission.values(admission.ROWS, *shape, dtype=dtype, cancelling=cancelling)
                for shape, cancelling in zip(shapes, (False, False, True), strict=True)
            ]
            x = torch.cat([part.flatten(1) for part in parts], 1).npu()
            found = admission.rows_agree(partial(_one_kind, fn, shapes, masked), x)
            if found is not None:
                return f"{length} of {keys} tokens{', masked' if masked else ''}: {found}"
    return None


def _one_kind(
    fn: Callable[..., Any], shapes: Sequence[Sequence[int]], masked: bool, x: Tensor
) -> Tensor:
    """Attention of sequences that hold query, key and transposed value one behind the other."""
    parts = x.split([math.prod(shape) for shape in shapes], 1)
    q, k, v = (part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True))
    keep = (k[:, :1, None, :, 0] > 0).expand(-1, -1, q.size(2), -1) if masked else None
    return attend(fn, q / 4, k / 4, v.mT, keep, q.size(2) == k.size(2), q.size(3) ** -0.5)[0]
