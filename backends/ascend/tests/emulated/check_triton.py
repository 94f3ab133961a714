"""Tier C on the emulated device: the Triton kernels in the interpreter, on whole numbers."""

from __future__ import annotations

import torch

import batch_invariant as bi
import npu_kernels
from batch_invariant_ascend.admission import same_bits

_generator = torch.Generator().manual_seed(1)
X = torch.randint(-4, 4, (5, 70), generator=_generator).float()
W = torch.randint(-4, 4, (9, 70), generator=_generator).float()


def test_tier_c_is_chosen(mode: None) -> None:
    kernels = bi.current_backend("npu").kernels()
    assert {kernels[n].source[0] for n in ("mm", "linear", "sum", "softmax", "rms_norm")} == {"C"}
    assert str(kernels["sum"].order) == "lanes(1024, 8192)"


def test_products_reach_the_kernel(mode: None) -> None:
    b = torch.arange(9.0)
    found = torch.nn.functional.linear(X.npu(), W.npu(), b.npu()).cpu()
    assert same_bits(found, (X.double() @ W.double().mT + b).float())
    assert same_bits((X.npu() @ W.npu().mT).cpu(), (X.double() @ W.double().mT).float())
    batch = torch.bmm(X[:, None].npu(), X[..., None].npu()).cpu()
    assert same_bits(batch.flatten(), X.double().square().sum(1).float())
    assert not npu_kernels.SUMS & set(npu_kernels.log)


def test_rows_reach_the_kernels(mode: None) -> None:
    x = X / 7
    assert same_bits(x.npu().sum(1).cpu(), bi.sum(x, 1))
    whole = torch.softmax(x.npu(), 1).cpu()
    torch.testing.assert_close(whole.double(), x.double().softmax(1), rtol=1e-5, atol=0)
    assert same_bits(torch.softmax(x[3:4].npu(), 1).cpu(), whole[3:4])
    normed, rstd = torch.ops.npu.npu_rms_norm(x.npu(), W[0].npu(), 1e-5)
    exact = torch.nn.functional.rms_norm(x.double(), (70,), W[0].double(), 1e-5)
    torch.testing.assert_close(normed.cpu().double(), exact, rtol=1e-5, atol=1e-9)
    assert rstd.shape == (5, 1)
    one, _ = torch.ops.npu.npu_rms_norm(x[3:4].npu(), W[0].npu(), 1e-5)
    assert same_bits(one.cpu(), normed[3:4].cpu())
