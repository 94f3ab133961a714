"""Backward through every operator: against finite differences, and against stock torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import batch_invariant as bi


def _leaf(*shape: int, positive: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x.abs() + 0.5 if positive else x).requires_grad_()


_FUNCTIONAL: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "mm": (bi.mm, (_leaf(3, 4), _leaf(4, 2))),
    "addmm": (
        lambda s, a, b: bi.addmm(s, a, b, beta=2, alpha=3),
        (_leaf(2), _leaf(3, 4), _leaf(4, 2)),
    ),
    "bmm": (bi.bmm, (_leaf(2, 3, 4), _leaf(2, 4, 2))),
    "baddbmm": (bi.baddbmm, (_leaf(1, 2), _leaf(2, 3, 4), _leaf(2, 4, 2))),
    "linear": (bi.linear, (_leaf(2, 3, 4), _leaf(5, 4), _leaf(5))),
    "linear 1-D weight": (bi.linear, (_leaf(3, 4), _leaf(4), _leaf())),
    "matmul": (bi.matmul, (_leaf(2, 1, 3, 4), _leaf(5, 4, 2))),
    "softmax": (lambda x: bi.softmax(x, 1), (_leaf(3, 4, 2),)),
    "log_softmax": (lambda x: bi.log_softmax(x, -1), (_leaf(3, 4),)),
    "logsumexp": (lambda x: bi.logsumexp(x, (0, 2)), (_leaf(3, 4, 2),)),
    "sum": (lambda x: bi.sum(x, 1), (_leaf(3, 4, 2),)),
    "sum all": (bi.sum, (_leaf(3, 4),)),
    "mean": (lambda x: bi.mean(x, (0, 1), True), (_leaf(3, 4, 2),)),
    "prod": (lambda x: bi.prod(x, 1), (_leaf(3, 4),)),
    "var": (lambda x: bi.var(x, 1, correction=0), (_leaf(3, 4),)),
    "std": (lambda x: bi.std(x, (0, 2), keepdim=True), (_leaf(3, 4, 2),)),
    "norm 2": (lambda x: bi.norm(x, dim=1), (_leaf(3, 4),)),
    "norm 1": (lambda x: bi.norm(x, 1, 1), (_leaf(3, 4),)),
    "norm 3": (lambda x: bi.norm(x, 3), (_leaf(3, 4),)),
    "norm inf": (lambda x: bi.norm(x, float("inf"), 1), (_leaf(3, 4),)),
    "cumsum": (lambda x: bi.cumsum(x, 1), (_leaf(3, 4, 2),)),
    "rms_norm": (lambda x, w: bi.rms_norm(x, w, 1e-3), (_leaf(3, 6), _leaf(6))),
    "rms_norm residual": (
        lambda x, w, r: bi.rms_norm(x, w, 1e-3, residual=r),
        (_leaf(3, 6), _leaf(6), _leaf(3, 6)),
    ),
    "rms_norm variance_size": (lambda x: bi.rms_norm(x, eps=1e-3, variance_size=4), (_leaf(3, 6),)),
    "layer_norm": (
        lambda x, w, b: bi.layer_norm(x, (4, 2), w, b),
        (_leaf(3, 4, 2), _leaf(4, 2), _leaf(4, 2)),
    ),
    "group_norm": (lambda x, w, b: bi.group_norm(x, 2, w, b), (_leaf(3, 4, 5), _leaf(4), _leaf(4))),
    "attention": (
        bi.scaled_dot_product_attention,
        (_leaf(2, 2, 3, 4), _leaf(2, 2, 5, 4), _leaf(2, 2, 5, 3)),
    ),
    "attention causal": (
        lambda q, k, v: bi.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4),
        (_leaf(1, 2, 5, 4), _leaf(1, 2, 5, 4), _leaf(1, 2, 5, 3)),
    ),
    "attention mask and groups": (
        lambda q, k, v, m: bi.scaled_dot_product_attention(q, k, v, m, enable_gqa=True),
        (_leaf(1, 4, 3, 4), _leaf(1, 2, 5, 4), _leaf(1, 2, 5, 3), _leaf(3, 5)),
    ),
    "embedding": (lambda w: bi.embedding(torch.tensor([[0, 2], [2, 2]]), w), (_leaf(4, 3),)),
    "topk": (lambda x: bi.topk(x, 2)[0], (_leaf(3, 5),)),
    "exp": (bi.exp, (_leaf(7),)),
    "log": (bi.log, (_leaf(7, positive=True),)),
    "rsqrt": (bi.rsqrt, (_leaf(7, positive=True),)),
    "sin": (bi.sin, (_leaf(7),)),
    "cos": (bi.cos, (_leaf(7),)),
    "tanh": (bi.tanh, (_leaf(7),)),
    "erf": (bi.erf, (_leaf(7),)),
    "sigmoid": (bi.sigmoid, (_leaf(7),)),
    "silu": (bi.silu, (_leaf(7),)),
    "gelu": (bi.gelu, (_leaf(7),)),
    "gelu tanh": (lambda x: bi.gelu(x, approximate="tanh"), (_leaf(7),)),
    "pow": (lambda x: bi.pow(x, 2.5), (_leaf(7, positive=True),)),
}


@pytest.mark.parametrize("name", _FUNCTIONAL)
def test_functional_gradients_against_finite_differences(name: str) -> None:
    function, inputs = _FUNCTIONAL[name]
    assert gradcheck(function, inputs)


def test_a_wrong_gradient_is_caught() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return bi.sum(x)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return grad.expand(4) * 1.01

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradcheck(Wrong.apply, (_leaf(4),))


def test_gradients_of_a_product_with_zeros() -> None:
    x = torch.tensor([[2.0, 0.0, 3.0], [0.0, 0.0, 3.0], [1.0, 2.0, 3.0]], requires_grad=True)
    (got,) = torch.autograd.grad(bi.prod(x, 1).sum(), x)
    (want,) = torch.autograd.grad(x.prod(1).sum(), x)
    assert torch.equal(got, want)


def _block(dtype: torch.dtype) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """Most operators of a transformer and of a classifier in one function."""
    g = torch.Generator().manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    x, w1, w2, wn, b, table = (
        make(6, 9, 32),
        make(96, 32),
        make(32, 32),
        make(32),
        make(32),
        make(11, 32),
    )

    def f(*leaves: torch.Tensor) -> torch.Tensor:
        x, w1, w2, wn, b, table = leaves
        h = F.rms_norm(x + F.embedding(torch.arange(9) % 11, table), (32,), wn, 1e-6)
        q, k, v = F.linear(h, w1).view(6, 9, 3, 2, 16).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = x + F.linear(a.transpose(1, 2).reshape(6, 9, 32), w2, b)
        h = F.silu(F.layer_norm(h, (32,), wn, b)) + F.gelu(h) + F.group_norm(h, 3)
        p = (h @ table.mT).log_softmax(-1)
        spread = h.var(-1).mean() + h.std() + torch.linalg.vector_norm(h, dim=-1).sum()
        return p[..., 3].sum() + spread + h.cumsum(1).softmax(1).logsumexp(1).mean()

    return f, [x, w1, w2, wn, b, table]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_modes_gradients_agree_with_stock_torch(dtype: torch.dtype) -> None:
    f, leaves = _block(dtype)
    stock = torch.autograd.grad(f(*leaves), leaves)
    with bi.enabled():
        ours = torch.autograd.grad(f(*leaves), leaves)
    rough = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1}[dtype]
    for name, a, b in zip(("x", "w1", "w2", "wn", "b", "table"), ours, stock, strict=True):
        scale = b.double().abs().max()
        error = (a.double() - b.double()).abs().max() / scale
        assert error < rough, (name, float(error))


def test_gradients_of_a_row_do_not_depend_on_the_batch() -> None:
    """The gradient of each sample's own input, alone and in the batch, bit for bit."""
    _, leaves = _block(torch.float32)
    x, *weights = leaves

    def loss(rows: torch.Tensor) -> torch.Tensor:
        w1, w2, wn, b, _ = weights
        q, k, v = (
            F.linear(F.rms_norm(rows, (32,), wn), w1).view(-1, 9, 3, 2, 16).permute(2, 0, 3, 1, 4)
        )
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return F.linear(F.layer_norm(a.reshape(-1, 9, 32), (32,)), w2, b).softmax(-1).square().sum()

    with bi.enabled():
        (together,) = torch.autograd.grad(loss(x), x)
        for i in range(6):
            row = x[i : i + 1].detach().clone().requires_grad_()
            (alone,) = torch.autograd.grad(loss(row), row)
            assert torch.equal(alone.view(torch.int32), together[i : i + 1].view(torch.int32))
