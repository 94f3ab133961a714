"""Tier A on the emulated device: CANN's own kernels under batch consistency, after a comparison."""

from __future__ import annotations

import pytest
import torch
import torch_npu

import batch_invariant as bi
import fakes
import npu_kernels
from batch_invariant_ascend import npu_attention
from batch_invariant_ascend.admission import same_bits
from npu_device import npu

X = torch.randn(9, 260, generator=torch.Generator().manual_seed(1))


def test_tier_a_is_chosen_and_runs_the_vendors_kernels(mode: None) -> None:
    kernels = bi.current_backend("npu").kernels()
    names = ("mm", "sum", "softmax", "rms_norm", "scaled_dot_product_attention")
    assert {kernels[n].source_of(torch.bfloat16)[0] for n in names} == {"A"}
    assert {str(kernels[n].guarantee) for n in ("mm", "sum", "softmax")} == {"batch"}
    assert npu.level == 3
    x = X.npu()
    whole = (x @ x.mT).cpu()
    assert same_bits((x[2:3] @ x.mT).cpu(), whole[2:3])
    assert "mm" in npu_kernels.log


def test_losing_level_3_is_an_error() -> None:
    with bi.enabled():
        X.npu().sum(-1)
        torch.use_deterministic_algorithms(False)
        for call in (lambda x: x.sum(-1), lambda x: x @ x.mT, lambda x: x.softmax(-1)):
            with pytest.raises(bi.OpNotSupported, match="use_deterministic_algorithms"):
                call(X.npu())
    with bi.enabled():
        X.npu().sum(-1)


def test_a_bias_is_added_before_the_one_rounding(mode: None) -> None:
    x, b = X.bfloat16(), torch.randn(9).bfloat16()
    out = torch.nn.functional.linear(x.npu(), x.npu(), b.npu()).cpu()
    assert same_bits(out, bi.linear(x.float(), x.float(), b.float()).bfloat16())


def test_prefill_and_decode_go_in_separate_calls(
    mode: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    chosen = npu_attention.choice("")
    assert chosen.tier.name == "A"
    lengths, keys = [1, 5, 1, 3], [9, 5, 20, 11]
    ends, key_ends = torch.tensor(lengths).cumsum(0), torch.tensor(keys).cumsum(0)

    def note(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **words: object) -> object:
        calls.append((len(q), len(k), words["actual_seq_lengths"], words["actual_seq_lengths_kv"]))
        return q * 2, q.new_empty(0)

    monkeypatch.setattr(
        npu_attention, "choice", lambda version: type(chosen)(chosen.tier, note, ())
    )
    q, k = torch.randn(10, 4, 16), torch.randn(45, 2, 16)
    words = {"num_heads": 4, "num_key_value_heads": 2, "input_layout": "TND"}
    out, _ = torch_npu.npu_fused_infer_attention_score(
        *(t.npu() for t in (q, k, k)),
        actual_seq_lengths=ends.tolist(),
        actual_seq_lengths_kv=key_ends.tolist(),
        **words,
    )
    assert calls == [(2, 29, [1, 2], [9, 29]), (8, 16, [5, 8], [5, 16])]
    assert same_bits(out.cpu(), q * 2), "every row came back to its place"
    calls.clear()
    table = torch.arange(8, dtype=torch.int32).view(4, 2).npu()
    torch_npu.npu_fused_infer_attention_score(
        *(t.npu() for t in (q, k, k)),
        actual_seq_lengths=ends.tolist(),
        actual_seq_lengths_kv=keys,
        block_table=table,
        **words,
    )
    assert [c[2:] for c in calls] == [([1, 2], [9, 20]), ([5, 8], [5, 11])]
    calls.clear()
    torch_npu.npu_fused_infer_attention_score(
        *(t.npu() for t in (q, k, k)),
        actual_seq_lengths=[5, 10],
        actual_seq_lengths_kv=[5, 45],
        **words,
    )
    assert len(calls) == 1, "nothing is mixed, so nothing is split"


def test_the_level_is_restored() -> None:
    with bi.enabled():
        X.npu().sum()
    assert npu.level == 0
    assert not torch.are_deterministic_algorithms_enabled()
    assert fakes.options == {"ALLOW_INTERNAL_FORMAT": "disable", "ALLOW_MATMUL_HF32": "disable"}
