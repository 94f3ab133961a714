"""npu_fused_infer_attention_score, `_v2` and `.out`: by tier, prefill and decode in separate calls.

A and B: CANN's or AscendC's kernel, which sequences of one new token (decode) never enter together
with longer ones: mixed calls were seen to choose another kernel. Otherwise: each sequence on its
own, composed of products, as `attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from batch_invariant.errors import OpNotSupported
from batch_invariant_ascend import admission
from batch_invariant_ascend.attention import attend
from batch_invariant_ascend.dtypes import DTYPES, check_dtype
from batch_invariant_ascend.fused_attention import (
    NAME,
    RENAMED,
    batch_invariant,
    is_given,
    native,
)
from batch_invariant_ascend.paged import sequences_of, split, together
from batch_invariant_ascend.tiers import Candidate, Choice, Tier, choose

Tensor = torch.Tensor
_UNDERSTOOD = frozenset(
    """
    atten_mask actual_seq_lengths actual_seq_lengths_kv block_table num_heads scale input_layout
    num_key_value_heads sparse_mode block_size softmax_lse_flag pre_tokens next_tokens inner_precise
    """.split()
)
_ALL_TOKENS = 2147483647


@cache
def choice(version: str) -> Choice:
    """The tier of attention here; version is "" or "_v2"."""
    return choose(
        NAME + version,
        (
            Candidate(Tier.A, lambda: native(version), lambda fn: _varies(fn, version)),
            Candidate(Tier.B, lambda: batch_invariant(version), lambda fn: _varies(fn, version)),
            Candidate(Tier.D, lambda: _composed),
        ),
    )


def _varies(fn: Callable[..., Any], version: str) -> str | None:
    """A call with several sequences against a call with each one alone, prefill and decode."""
    names = {old: new for new, old in RENAMED.items()} if version else {}
    for dtype in (torch.bfloat16, torch.float16):
        for lengths in ([3, 17, 5, 40], [1] * 9):
            keys = [length + 130 for length in lengths]
            q = admission.values(sum(lengths), 4, 64, dtype=dtype, cancelling=False).npu() / 4
            k = admission.values(sum(keys), 2, 64, dtype=dtype, cancelling=False).npu() / 4

            def call(
                rows: slice, columns: slice, size: list[int], key_size: list[int], q=q, k=k
            ) -> Tensor:
                kw = {
                    "actual_seq_lengths": together(size),
                    "actual_seq_lengths_kv": together(key_size),
                    "num_heads": 4,
                    "num_key_value_heads": 2,
                    "scale": 0.125,
                    "input_layout": "TND",
                }
                kw = {names.get(name, name): value for name, value in kw.items()}
                out: Tensor = fn(q[rows], k[columns], k[columns], **kw)[0]
                return out.cpu()

            whole = call(slice(None), slice(None), lengths, keys)
            for i in range(len(lengths)):
                rows = slice(sum(lengths[:i]), sum(lengths[: i + 1]))
                columns = slice(sum(keys[:i]), sum(keys[: i + 1]))
                if not admission.same_bits(
                    whole[rows], call(rows, columns, [lengths[i]], [keys[i]])
                ):
                    return f"sequence {i} of {len(lengths)} differs when computed alone, {dtype}"
    return None


def _override(version: str) -> Callable[..., Any]:
    def fused(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
        check_dtype(NAME, query)
        chosen = choice(version)
        if chosen.tier is Tier.D:
            return _composed(query, key, value, **keywords)
        names = RENAMED if version else {}
        plain = {names.get(name, name): value_ for name, value_ in keywords.items()}
        back = {old: new for new, old in names.items()}

        def call(q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
            out: tuple[Tensor, Tensor] = chosen.fn(
                q, k, v, **{back.get(name, name): value_ for name, value_ in kw.items()}
            )
            return out

        return split(call, query, key, value, plain)

    return fused


def _out(version: str) -> Callable[..., Any]:
    fused = _override(version)

    def write(
        query: Tensor, key: Tensor, value: Tensor, *, out: Sequence[Tensor], **keywords: Any
    ) -> tuple[Tensor, ...]:
        keywords.pop("workspace", None)
        results = fused(query, key, value, **keywords)
        for target, result in zip(out, results, strict=False):
            if target.shape != result.shape:
                target.resize_(result.shape)
            target.copy_(result)
        return tuple(out)

    return write


def _composed(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """Each sequence and head on its own: rows see only their own keys, whatever shares the call."""
    kw = {RENAMED.get(name, name): value_ for name, value_ in keywords.items()}
    unknown = sorted(
        name for name, value_ in kw.items() if name not in _UNDERSTOOD and is_given(value_)
    )
    if unknown:
        raise OpNotSupported(
            f"{NAME} with {', '.join(unknown)} has no invariant implementation composed of "
            "others; install the AscendC package batch_invariant_ops, or CANN >= 9.2.0 "
            "(docs/ascend.md)"
        )
    mode = kw.get("sparse_mode", 0)
    limits = [kw.get(name, _ALL_TOKENS) for name in ("pre_tokens", "next_tokens")]
    if mode not in (0, 2, 3) or (
        mode == 0 and min(limits) < max(query.size(0), key.size(0)) * 1024
    ):
        raise OpNotSupported(
            f"{NAME} with sparse_mode={mode}, pre_tokens={limits[0]}, next_tokens={limits[1]}: "
            "composed of others there are 0 (all keys, or atten_mask), 2 and 3 (causal)"
        )
    return together_composed(query, key, value, kw, mode)


def together_composed(
    query: Tensor, key: Tensor, value: Tensor, kw: dict[str, Any], mode: int
) -> tuple[Tensor, Tensor]:
    """The composed attention of every sequence, put back in the layout of the call."""
    layout = sequences_of(query, key, value, kw)
    heads = int(kw.get("num_heads", 1))
    scale = float(kw.get("scale", 1.0))
    outs, lses = [], []
    for index, (q, k, v) in enumerate(layout.sequences()):
        # q [N, L, D], k and v [Nkv, S, D]
        repeat = heads // k.size(0)
        k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
        keep = _keep(kw.get("atten_mask"), mode, index, q, k)
        out, lse = attend(q, k, v, keep, None, scale)
        outs.append(out.to(query.dtype))
        lses.append(lse)
    return layout.put_together(outs), layout.log_sums(lses, bool(kw.get("softmax_lse_flag")))


def _keep(mask: Tensor | None, mode: int, index: int, q: Tensor, k: Tensor) -> Tensor | None:
    length, keys = q.size(1), k.size(1)
    if mode in (2, 3):
        # 2: the diagonal begins top left; 3: it ends bottom right, as decode and prefix hits need.
        begin = keys - length if mode == 3 else 0
        rows = torch.arange(length, device=q.device)[:, None] + begin
        keep = torch.arange(keys, device=q.device)[None] <= rows
    elif mask is None:
        return None
    else:
        one = mask
        while one.dim() > 2:
            one = one[index if one.size(0) > 1 else 0]
        keep = ~one[:length, :keys].bool()
    return keep.expand(q.size(0), length, keys)


def notes() -> list[str]:
    """For `bi doctor`."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1")
    tiers = [
        f"{NAME}{version}: {choice(version).tier.value}"
        for version in ("", "_v2")
        if f"npu::{NAME}{version}" in registered
    ]
    dtypes = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in DTYPES))
    return [*tiers, f"dtypes {dtypes}, norms of torch_npu with 1 to 8 dimensions; others raise"]


OVERRIDES = {
    f"npu::{NAME}": _override(""),
    f"npu::{NAME}.out": _out(""),
    f"npu::{NAME}_v2": _override("_v2"),
    f"npu::{NAME}_v2.out": _out("_v2"),
}
"""By the name of the operator."""
