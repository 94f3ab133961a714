"""Tier B on the emulated device: the AscendC package, after a comparison."""

from __future__ import annotations

import torch

import batch_invariant as bi
import fakes
from batch_invariant_ascend.admission import same_bits

X = torch.randn(9, 260, generator=torch.Generator().manual_seed(1)).bfloat16()


def test_each_operator_has_its_own_tier(mode: None) -> None:
    kernels = bi.current_backend("npu").kernels()
    tiers = {name: kernel.source_of(torch.bfloat16)[0] for name, kernel in kernels.items()}
    assert tiers["mm"] == tiers["linear"] == tiers["sum"] == tiers["log_softmax"] == "B"
    assert tiers["softmax"] == "B"  # composed on AscendC's sum: it has no softmax
    assert tiers["scaled_dot_product_attention"] == "B"
    assert tiers["cumsum"] == "D"
    assert any("A needs CANN >= 9.2.0" in reason for reason in kernels["mm"].better)


def test_calls_reach_ascendc_in_the_form_it_takes(mode: None) -> None:
    x = X.npu()
    whole = (x @ x.mT).cpu()
    assert same_bits((x[2:3] @ x.mT).cpu(), whole[2:3])
    assert "npu_mm_batch_invariant" in fakes.called
    fakes.called.clear()
    # Dimensions that its kernel refuses: moved to the end first.
    for dim in (0, (0, 1), None):
        assert same_bits(x.sum(dim).cpu(), bi.sum(X, dim))
    assert fakes.called.count("npu_reduce_sum_batch_invariant") == 3


def test_a_bias_is_added_before_the_one_rounding(mode: None) -> None:
    b = torch.randn(9).bfloat16()
    out = torch.nn.functional.linear(X.npu(), X.npu(), b.npu()).cpu()
    assert same_bits(out, bi.linear(X.float(), X.float(), b.float()).bfloat16())
    assert not same_bits(out, (bi.linear(X.float(), X.float()).bfloat16() + b)), "the control"
