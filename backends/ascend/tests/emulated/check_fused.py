"""torch_npu's fused operators on the emulated device: replaced, refused, left alone; undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu
from torch_npu import npu_add_rms_norm as imported_before

import batch_invariant as bi
import fakes
from batch_invariant_ascend.admission import same_bits

_generator = torch.Generator().manual_seed(11)
X = torch.randn(7, 129, generator=_generator).bfloat16()
R = torch.randn(7, 129, generator=_generator).bfloat16()
G = torch.randn(129, generator=_generator).bfloat16()
EPS = 1e-5


def _expected() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, rstd and s in float64 from the definition."""
    s = X.double() + R.double()
    rstd = 1 / (s.square().mean(-1, keepdim=True) + EPS).sqrt()
    return s * rstd * G.double(), rstd, s


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize(
    "fn",
    [
        lambda *a, **k: torch_npu.npu_add_rms_norm(*a, **k),
        lambda *a, **k: torch.ops.npu.npu_add_rms_norm(*a, **k),
        lambda *a, **k: torch.ops.npu.npu_add_rms_norm.default(*a, **k),
        imported_before,
    ],
    ids=["torch_npu.", "torch.ops.npu.", ".default", "imported before"],
)
def test_add_rms_norm_by_every_name(fn: Any) -> None:
    y, rstd, x = fn(X.npu(), R.npu(), G.npu(), epsilon=EPS)
    exact_y, exact_rstd, exact_s = _expected()
    assert (y.dtype, rstd.dtype, x.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert rstd.shape == (7, 1)
    torch.testing.assert_close(y.cpu().double(), exact_y, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(rstd.cpu().double(), exact_rstd, rtol=1e-6, atol=0)
    assert same_bits(x.cpu(), exact_s.to(torch.bfloat16))
    one = fn(X[2:3].npu(), R[2:3].npu(), G.npu(), epsilon=EPS)
    assert all(same_bits(a.cpu(), b[2:3].cpu()) for a, b in zip(one, (y, rstd, x), strict=True))
    assert "npu_add_rms_norm" not in fakes.called


@pytest.mark.usefixtures("mode")
def test_the_sum_is_not_rounded_before_the_norm() -> None:
    """A split that rounds it has another y."""
    x, r = X, R / 64
    y = torch_npu.npu_add_rms_norm(x.npu(), r.npu(), G.npu(), EPS)[0].cpu()
    ours = bi.rms_norm(x, G, EPS, residual=r)[0]
    rounded = bi.rms_norm((x + r), G, EPS)
    assert same_bits(y, ours)
    assert not same_bits(y, rounded)


@pytest.mark.usefixtures("mode")
def test_add_rms_norm_variants_return_in_torch_npus_order() -> None:
    y, rstd, x = torch_npu.npu_add_rms_norm(X.npu(), R.npu(), G.npu(), EPS)
    a, b = X.npu(), R.npu()
    kept = torch_npu.npu_add_rms_norm_v2(a, b, G.npu(), epsilon=EPS)
    assert [same_bits(p.cpu(), q.cpu()) for p, q in ((kept, rstd), (a, y), (b, x))] == [True] * 3
    functional = torch_npu.npu_add_rms_norm_v2_functional(X.npu(), R.npu(), G.npu(), EPS)
    assert all(same_bits(p.cpu(), q.cpu()) for p, q in zip(functional, (rstd, y, x), strict=True))
    cast = torch_npu.npu_add_rms_norm_cast(X.npu(), R.npu(), G.npu(), EPS)
    assert all(
        same_bits(p.cpu(), q.cpu()) for p, q in zip(cast, (y.float(), y, rstd, x), strict=True)
    )


@pytest.mark.usefixtures("mode")
def test_rms_norm_gemma_and_backward() -> None:
    y, rstd = torch_npu.npu_rms_norm(X.npu(), G.npu(), epsilon=EPS)
    assert same_bits(y.cpu(), bi.rms_norm(X, G, EPS))
    gemma, _ = torch_npu.npu_gemma_rms_norm(X.npu(), G.npu(), EPS)
    assert same_bits(gemma.cpu(), bi.rms_norm(X, G.float() + 1, EPS))
    # gamma over two dimensions, and fp32 gamma with a half input
    wide, two = torch_npu.npu_rms_norm(X.view(7, 3, 43).npu(), G.view(3, 43).float().npu(), EPS)
    assert same_bits(wide.view(7, 129).cpu(), y.cpu())
    assert two.shape == (7, 1, 1)
    x, g = X.double().requires_grad_(), G.double().requires_grad_()
    dy = R.double()
    (x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * g * dy).sum().backward()
    dx, dg = torch_npu.npu_rms_norm_backward(R.npu(), X.npu(), G.npu(), rstd)
    torch.testing.assert_close(dx.cpu().double(), x.grad, rtol=2**-6, atol=2e-2)
    torch.testing.assert_close(dg.cpu().double(), g.grad, rtol=2**-6, atol=2e-2)


@pytest.mark.usefixtures("mode")
def test_bad_calls_of_the_norms() -> None:
    with pytest.raises(bi.OpNotSupported, match=r"gamma of shape \[7\] does not end"):
        torch_npu.npu_rms_norm(X.npu(), torch.ones(7).bfloat16().npu())
    with pytest.raises(bi.OpNotSupported, match="one shape and one dtype"):
        torch_npu.npu_add_rms_norm(X.npu(), R[:3].npu(), G.npu())
    with pytest.raises(bi.OpNotSupported, match=r"got torch\.float64"):
        torch_npu.npu_rms_norm(X.double().npu(), G.double().npu())


@pytest.mark.usefixtures("mode")
def test_products_by_name() -> None:
    w = torch.randn(31, 129, generator=_generator).bfloat16()
    assert same_bits(
        torch_npu.npu_linear(X.npu(), w.npu()).cpu(), bi.linear(X.npu(), w.npu()).cpu()
    )
    out = torch_npu.npu_bmmV2(X[None].npu(), w.mT[None].npu(), [])
    assert same_bits(out[0].cpu(), bi.linear(X.npu(), w.npu()).cpu())


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize(("kind", "groups"), [(0, [2, 2, 7]), (1, [2, 0, 5])])
def test_grouped_matmul_rows_see_their_own_expert(kind: int, groups: list[int]) -> None:
    experts = torch.randn(3, 129, 17, generator=_generator).bfloat16().npu()
    (out,) = torch_npu.npu_grouped_matmul(
        [X.npu()],
        [experts],
        group_list=torch.tensor(groups),
        group_list_type=kind,
        group_type=0,
        split_item=3,
    )
    assert same_bits(out[:2].cpu(), bi.mm(X[:2].npu(), experts[0]).cpu())
    assert same_bits(out[2:].cpu(), bi.mm(X[2:].npu(), experts[2]).cpu())
    with pytest.raises(bi.OpNotSupported, match="scale has no invariant kernel"):
        torch_npu.npu_grouped_matmul([X.npu()], [experts], scale=[X.npu()], group_list=None)
    with pytest.raises(bi.OpNotSupported, match="one entry for each weight"):
        torch_npu.npu_grouped_matmul(
            [X.npu()], [experts], group_list=torch.tensor([7]), group_type=0, split_item=3
        )


@pytest.mark.usefixtures("mode")
def test_what_is_not_replaced_is_refused_or_left_alone() -> None:
    x = X.npu()
    with pytest.raises(bi.OpNotSupported, match="VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE=0"):
        torch_npu.npu_mm_all_reduce_base(x, x.mT, "hccl")
    with pytest.raises(bi.OpNotSupported, match="npu_fused_infer_attention_score"):
        torch_npu.npu_prompt_flash_attention(x, x, x)
    with pytest.raises(bi.UncoveredOpError, match="npu::npu_of_the_future"):
        torch_npu.npu_of_the_future(x)
    assert torch_npu.npu_transpose(x, [1, 0]).shape == (129, 7)  # copies
    half = torch_npu.npu_swiglu(x[:, :128])  # elementwise, and alike at every place
    assert same_bits(half[2:3].cpu(), torch_npu.npu_swiglu(x[2:3, :128]).cpu())


def test_allow_names_a_vendor_operator() -> None:
    with bi.enabled(allow=["npu::npu_ffn"]), pytest.raises(AssertionError, match="was reached"):
        torch_npu.npu_ffn(X.npu(), X.npu(), X.npu(), "relu")
    with bi.enabled(), pytest.raises(bi.UncoveredOpError, match=r"allow=\['npu::npu_ffn'\]"):
        torch_npu.npu_ffn(X.npu(), X.npu(), X.npu(), "relu")
    with pytest.raises(bi.ConfigurationError, match="npu::nothing"):
        bi.enable(allow=["npu::nothing"])


@pytest.mark.usefixtures("mode")
def test_nz_weights() -> None:
    weight = X.npu()
    with pytest.raises(bi.OpNotSupported, match="VLLM_ASCEND_ENABLE_NZ=0"):
        torch_npu.npu_format_cast(weight, 29)
    assert torch_npu.npu_format_cast(weight, 2).shape == weight.shape
    fakes.formats[weight.data_ptr()] = 29
    try:
        with pytest.raises(bi.OpNotSupported, match="FRACTAL_NZ"):
            torch.mm(R.npu(), weight.mT)
    finally:
        fakes.formats.clear()


def test_everything_is_undone() -> None:
    with bi.enabled():
        torch_npu.npu_add_rms_norm(X.npu(), R.npu(), G.npu())
    fakes.called.clear()
    y, *_ = torch_npu.npu_add_rms_norm(X.npu(), R.npu(), G.npu())
    one, *_ = imported_before(X[:1].npu(), R[:1].npu(), G.npu())
    assert fakes.called == ["npu_add_rms_norm"] * 2
    assert not same_bits(y[:1].cpu(), one.cpu()), "the fake is batch-variant: this is the control"
    with pytest.raises(AssertionError, match="was reached"):
        torch_npu.npu_of_the_future(X.npu())
