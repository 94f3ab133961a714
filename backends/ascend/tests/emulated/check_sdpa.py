"""scaled_dot_product_attention by the vendor's fused kernel on the emulated device, tiers A, B."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import batch_invariant as bi
import fakes
from batch_invariant_ascend import fused_attention
from batch_invariant_ascend.admission import same_bits

_generator = torch.Generator().manual_seed(8)
Tensor = torch.Tensor
HEADS, KV_HEADS, SIZE = 4, 2, 32


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator).bfloat16()


def _calls() -> list[str]:
    return [name for name in fakes.called if name.startswith(fused_attention.NAME)]


Q, K, V = _drawn(5, HEADS, 7, SIZE), _drawn(5, KV_HEADS, 19, SIZE), _drawn(5, KV_HEADS, 19, SIZE)
MASK = torch.rand(5, 1, 7, 19, generator=_generator) > 0.4
MASK[..., 0] = True
TAKEN: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "prefill": ((Q, K[:, :, :7], V[:, :, :7]), {"is_causal": True, "enable_gqa": True}),
    "causal, more keys": ((Q, K, V), {"is_causal": True, "enable_gqa": True}),
    "causal, more queries": (
        (Q, K[:, :, :3], V[:, :, :3]),
        {"is_causal": True, "enable_gqa": True},
    ),
    "causal, one token": ((Q[:, :, :1], K, V), {"is_causal": True, "enable_gqa": True}),
    "decode": ((Q[:, :, :1], K, V), {"enable_gqa": True, "scale": 0.25}),
    "mask": ((Q, K, V), {"attn_mask": MASK, "enable_gqa": True}),
    "mask of all sequences": ((Q, K, V), {"attn_mask": MASK[0, 0], "enable_gqa": True}),
    "decode with a mask": ((Q[:, :, :1], K, V), {"attn_mask": MASK[:, :, :1], "enable_gqa": True}),
    "no groups": ((Q[:, :2], K, V), {}),
    "one key head for all": ((Q, K[:, :1], V[:, :1]), {}),
    "[B, L, E]": ((Q[:, 0], K[:, 0], V[:, 0]), {}),
    "[B, L, E] with a mask": ((Q[:, 0], K[:, 0], V[:, 0]), {"attn_mask": MASK[:, 0]}),
    "[A, B, H, L, E]": ((Q[:, None], K[:, None], V[:, None]), {"enable_gqa": True}),
    "[..., H, L, E] as a model has it": (
        tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (Q, K, V)),
        {"enable_gqa": True},
    ),
}


def _on_npu(words: dict[str, Any], rows: slice) -> dict[str, Any]:
    mask = words.get("attn_mask")
    if mask is None:
        return words
    return {**words, "attn_mask": (mask if mask.dim() == 2 else mask[rows]).npu()}


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("dtype", fused_attention.DTYPES)
@pytest.mark.parametrize("name", TAKEN)
def test_the_vendors_kernel_takes_it(name: str, dtype: torch.dtype) -> None:
    tensors, words = TAKEN[name]
    tensors = tuple(t.to(dtype) for t in tensors)
    whole = sdpa(*(t.npu() for t in tensors), **_on_npu(words, slice(None))).cpu()
    exact = sdpa(*(t.double() for t in tensors), **words)
    torch.testing.assert_close(whole.double(), exact, rtol=2**-7, atol=2**-7)
    for rows in (slice(0, 1), slice(3, 4), slice(1, 5)):
        part = sdpa(*(t[rows].npu() for t in tensors), **_on_npu(words, rows)).cpu()
        assert same_bits(part, whole[rows])
    assert len(_calls()) == 4, "one for each call, and nothing composed"


LEFT: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "fp32": (tuple(t.float() for t in (Q, K, V)), {"enable_gqa": True}),
    "mask with values": ((Q, K, V), {"attn_mask": MASK.float(), "enable_gqa": True}),
    "mask for single heads": (
        (Q, K, V),
        {"attn_mask": MASK.expand(5, HEADS, 7, 19), "enable_gqa": True},
    ),
    "head size": ((Q[..., :24], K[..., :24], V[..., :24]), {"enable_gqa": True}),
    "values of another size": ((Q, K, V[..., :16]), {"enable_gqa": True}),
    "too many heads for a key": (
        (Q[:, :1].expand(5, 65, 7, SIZE), K[:, :1], V[:, :1]),
        {"enable_gqa": True},
    ),
    "no keys": ((Q, K[:, :, :0], V[:, :, :0]), {"enable_gqa": True}),
}


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("name", LEFT)
def test_the_rest_is_composed(name: str) -> None:
    tensors, words = LEFT[name]
    whole = sdpa(*(t.npu() for t in tensors), **_on_npu(words, slice(None))).cpu()
    exact = sdpa(*(t.double() for t in tensors), **words)
    torch.testing.assert_close(whole.double(), exact, rtol=2**-7, atol=2**-7)
    part = sdpa(*(t[1:2].npu() for t in tensors), **_on_npu(words, slice(1, 2))).cpu()
    assert same_bits(part, whole[1:2])
    assert not _calls()


def test_prefill_and_decode_are_told_apart(mode: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill gets the triangle that stands for every causal mask, decode none at all."""
    seen: list[dict[str, Any]] = []
    chosen = fused_attention.choice()

    def note(*tensors: Tensor, **words: Any) -> Any:
        seen.append({"query": tuple(tensors[0].shape), "key": tuple(tensors[1].shape), **words})
        return chosen.fn(*tensors, **words)

    monkeypatch.setattr(
        fused_attention, "choice", lambda: type(chosen)(chosen.tier, note, chosen.better)
    )
    q, k, v = (t.npu() for t in (Q, K, V))
    sdpa(q, k, v, is_causal=True, enable_gqa=True)
    sdpa(q[:, :, :1], k, v, enable_gqa=True, scale=0.5)
    triangle = seen[0].pop("atten_mask").cpu()
    assert torch.equal(triangle, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    same = {
        "num_heads": 4,
        "num_key_value_heads": 2,
        "input_layout": "BNSD",
        "softmax_lse_flag": True,
    }
    assert seen == [
        {
            **same,
            "query": (5, 4, 7, 32),
            "key": (5, 2, 7, 32),  # no query sees the other keys
            "scale": 1 / math.sqrt(SIZE),
            "sparse_mode": 2,
        },
        {**same, "query": (5, 4, 1, 32), "key": (5, 2, 19, 32), "scale": 0.5},
    ]


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("length", [1, 7])
def test_masked_keys_and_rows_without_keys(length: int) -> None:
    mask = MASK[:, :, :length].clone()
    mask[..., 4:] = False
    mask[2] = False
    k, v = K.clone(), V.clone()
    k[:, :, 4:], v[:, :, 4:] = torch.nan, torch.nan
    k[2], v[2] = torch.nan, torch.inf
    words = {"attn_mask": mask.npu(), "enable_gqa": True}
    out = sdpa(Q[:, :, :length].npu(), k.npu(), v.npu(), **words).cpu()
    assert not out.isnan().any()
    assert same_bits(out, sdpa(Q[:, :, :length].npu(), K.npu(), V.npu(), **words).cpu())
    assert same_bits(out[2], torch.zeros_like(out[2]))
    assert len(_calls()) == 2


@pytest.mark.usefixtures("mode")
def test_gradients_use_the_vendors_log_sums() -> None:
    leaves = [t.npu().requires_grad_() for t in (Q, K, V)]
    sdpa(*leaves, is_causal=True, enable_gqa=True).float().square().sum().backward()
    exact = [t.double().requires_grad_() for t in (Q, K, V)]
    sdpa(*exact, is_causal=True, enable_gqa=True).square().sum().backward()
    for ours, other in zip(leaves, exact, strict=True):
        torch.testing.assert_close(ours.grad.cpu().double(), other.grad, rtol=2**-5, atol=2**-5)
    assert len(_calls()) == 1


def test_doctor_shows_it_for_the_dtypes_that_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    from batch_invariant import cli

    kernel = bi.current_backend("npu").kernels()["scaled_dot_product_attention"]
    tier = fused_attention.choice().tier.value
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for dtype, shown in (("float32", "float32"), ("bfloat16", "bfloat16, float16")):
        source = kernel.source_of(getattr(torch, dtype))
        assert source.startswith(tier)
        assert source.endswith("composed of products")
        assert ("masks with values" in source) == (dtype == "bfloat16")
        (at,) = (i for i, line in enumerate(lines) if f"attention ({shown})" in line)
        assert lines[at - 1].endswith(f"({source})")
