"""Aten calls on the emulated device with the mode on: every one is caught, and rows are invariant.

The device's own sums are batch-variant on purpose; none may be reached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import batch_invariant as bi
import npu_kernels
from batch_invariant_ascend.admission import same_bits

Tensor = torch.Tensor
_generator = torch.Generator().manual_seed(7)
W = torch.randn(40, 130, generator=_generator)
X = torch.randn(9, 130, generator=_generator)
Y = torch.randn(9, 3, 64, generator=_generator)
Z = torch.randn(9, 64, 5, generator=_generator)
B = torch.randn(40, generator=_generator)


def _out(fn: Callable[..., Any]) -> Callable[..., Tensor]:
    def call(*args: Tensor) -> Tensor:
        out = torch.empty(0, device="npu")
        fn(*args, out=out)
        return out

    return call


PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int]] = {
    "mm": (torch.mm, (X, W.mT), 1),
    "mm.out": (_out(torch.mm), (X, W.mT), 1),
    "@": (lambda a, b: a @ b, (X, W.mT), 1),
    "linear": (F.linear, (X, W), 1),
    "linear bias": (F.linear, (X, W, B), 1),
    "linear 3-D bias": (lambda a, w, b: F.linear(a[None], w, b)[0], (X, W, B), 1),
    "addmm": (lambda a, w, b: torch.addmm(b, a, w), (X, W.mT, B), 1),
    "addmm.out": (lambda a, w, b: _out(torch.addmm)(b, a, w), (X, W.mT, B), 1),
    "addmm_": (lambda a, w: torch.ones(len(a), 40).npu().addmm_(a, w), (X, W.mT), 1),
    "inner": (torch.inner, (X, W), 1),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 1), (X, W.mT), 1),
    "einsum": (lambda a, b: torch.einsum("mk,nk->mn", a, b), (X, W), 1),
    "mv": (lambda a, b: torch.mv(a, b[0]), (X, W), 1),
    "addmv": (lambda a, b: torch.addmv(torch.ones(len(a)).npu(), a, b[0]), (X, W), 1),
    "bmm": (torch.bmm, (Y, Z), 2),
    "bmm.out": (_out(torch.bmm), (Y, Z), 2),
    "baddbmm": (lambda a, b: torch.baddbmm(torch.ones(5).npu(), a, b), (Y, Z), 2),
    "matmul broadcast": (lambda a, b: torch.matmul(a[:, None], b[:, None])[:, 0], (Y, Z), 2),
    "attention": (
        lambda a, b: F.scaled_dot_product_attention(a[:, None], b.mT[:, None], b.mT[:, None])[:, 0],
        (Y, Z),
        2,
    ),
}


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("name", PRODUCTS)
def test_product_is_caught_and_invariant(name: str) -> None:
    fn, arguments, batched = PRODUCTS[name]
    arguments = tuple(a.npu() for a in arguments)
    whole = fn(*arguments).cpu()
    for first, last in ((0, 1), (4, 5), (2, 9)):
        cut = [a[first:last] if i < batched else a for i, a in enumerate(arguments)]
        assert same_bits(fn(*cut).cpu(), whole[first:last])
    assert not npu_kernels.SUMS & set(npu_kernels.log)


def test_the_device_itself_varies() -> None:
    """The control: without the mode the same calls depend on the batch."""
    x, w = X.npu(), W.mT.npu()
    assert not same_bits((x[:1] @ w).cpu(), (x @ w)[:1].cpu())
    assert not same_bits(x[:1].sum(-1).cpu(), x.sum(-1)[:1].cpu())
    assert "mm" in npu_kernels.log


def test_dot_is_caught(mode: None) -> None:
    a = torch.dot(X[0].npu(), W[0].npu()).cpu()
    assert same_bits(a, bi.mm(X[:1].npu(), W[:1].mT.npu()).cpu()[0, 0])
    assert not npu_kernels.SUMS & set(npu_kernels.log)


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: torch.softmax(x, -1),
    "F.softmax dtype": lambda x: F.softmax(x, -1, dtype=torch.float32),
    "special.softmax": lambda x: torch.special.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "Tensor.softmax": lambda x: x.softmax(1),
    "softmax over dim 0": lambda x: x.mT.contiguous().softmax(0).mT,
    "cross_entropy": lambda x: F.cross_entropy(
        x, torch.zeros(len(x), dtype=torch.long, device="npu"), reduction="none"
    ),
    "logsumexp": lambda x: torch.logsumexp(x, 1),
    "mean": lambda x: x.mean(-1),
    "mean over two": lambda x: x.view(len(x), 2, -1).mean((1, 2)),
    "var": lambda x: x.var(1),
    "std": lambda x: torch.std(x, 1, correction=0),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "Tensor.norm": lambda x: x.norm(dim=1),
    "prod": lambda x: (x[:, :64] / 8 + 1).prod(1),
    "cumsum": lambda x: x[:, :64].cumsum(1),
    "rms_norm": lambda x: F.rms_norm(x, (x.size(1),)),
    "layer_norm": lambda x: F.layer_norm(x, (x.size(1),)),
    "group_norm": lambda x: F.group_norm(x.view(len(x), 10, -1), 5),
    "argmax": lambda x: x.argmax(1),
    "topk": lambda x: x.topk(3)[0],
    "silu": F.silu,
    "gelu": F.gelu,
    "exp": torch.exp,
    "x ** 1.7": lambda x: x.abs() ** 1.7,
}


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROWS)
def test_rows_are_caught_and_invariant(name: str, dtype: torch.dtype) -> None:
    fn, x = ROWS[name], X.to(dtype).npu()
    whole = fn(x).cpu()
    for first, last in ((0, 1), (4, 5), (2, 9)):
        assert same_bits(fn(x[first:last]).cpu(), whole[first:last])
    assert not npu_kernels.SUMS & set(npu_kernels.log)


@pytest.mark.usefixtures("mode")
def test_gradients_are_caught_and_equal_the_formulas() -> None:
    x, w, b = X.npu().requires_grad_(), W.npu().requires_grad_(), B.npu().requires_grad_()
    F.linear(x, w, b).softmax(-1)[:, 0].sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (X, W, B)]
    F.linear(*leaves).softmax(-1)[:, 0].sum().backward()
    for ours, exact in zip((x, w, b), leaves, strict=True):
        torch.testing.assert_close(ours.grad.cpu().double(), exact.grad, rtol=1e-3, atol=1e-5)
    assert not npu_kernels.SUMS & set(npu_kernels.log)


@pytest.mark.usefixtures("mode")
def test_an_operator_without_kernel_is_refused() -> None:
    with pytest.raises(bi.UncoveredOpError, match="aten::nansum"):
        X.npu().nansum()
    with pytest.raises(bi.UncoveredOpError, match="convolution"):
        F.conv1d(Y.npu(), torch.ones(3, 3, 3).npu())


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64])
def test_a_dtype_without_arithmetic_is_refused(dtype: torch.dtype) -> None:
    x = torch.ones(3, 3).to(dtype).npu()
    with pytest.raises(bi.OpNotSupported, match=rf"float32, bfloat16 and float16, and got {dtype}"):
        torch.mm(x, x)
