"""A vendor that breaks its promise: what varies here is passed over, and the user is told."""

from __future__ import annotations

import pytest
import torch

import batch_invariant as bi
import fakes

X = torch.randn(9, 261, generator=torch.Generator().manual_seed(1))


def test_products_that_vary_are_passed_over(mode: None) -> None:
    kernels = bi.current_backend("npu").kernels()
    assert kernels["mm"].source.startswith("D")
    assert any(
        reason.startswith("B is not batch-invariant on this device: products of matrices")
        for reason in kernels["mm"].better
    )
    assert kernels["sum"].source.startswith("B")
    (X.npu() @ X.npu().mT).cpu()
    assert "npu_mm_batch_invariant" not in fakes.called


def test_attention_that_varies_is_passed_over(mode: None) -> None:
    kernel = bi.current_backend("npu").kernels()["scaled_dot_product_attention"]
    assert kernel.source == "D: composed of elementwise operators"
    reasons = [reason for reason in kernel.better if "scaled_dot_product_attention" in reason]
    assert len(reasons) == 1
    assert reasons[0].startswith("B is not batch-invariant on this device")
    q = X[:, :256].view(9, 1, 4, 64).bfloat16().npu()
    torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert not [name for name in fakes.called if "attention" in name]


def test_an_elementwise_kernel_that_varies_is_refused(mode: None) -> None:
    backend = bi.current_backend("npu")
    assert "silu" not in backend.kernels()
    assert [gap.op for gap in backend.gaps()] == ["silu", "grouped_mm", "attention", "sample"]
    with pytest.raises(bi.UncoveredOpError, match="aten::silu"):
        torch.nn.functional.silu(X.npu())
    with pytest.raises(bi.OpNotSupported, match="no kernel for 'silu'"):
        bi.ops.CONTRACTS["silu"].overload(X.npu())


def test_exp_is_composed_instead() -> None:
    kernel = bi.current_backend("npu").kernels()["exp"]
    assert kernel.source.startswith("D")
    x = X.npu()
    assert torch.equal(kernel.fn(x)[:1].cpu(), kernel.fn(x[:1]).cpu())
    torch.testing.assert_close(kernel.fn(x).cpu().double(), X.double().exp(), rtol=1e-6, atol=0)
