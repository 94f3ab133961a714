"""With the mode on, torch's operators keep torch's semantics: shapes, dtypes, errors, values.

Values are compared loosely here, against stock torch on the same inputs: what is tested is that
the override computes the same function. Bits are tested by the conformance suite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import batch_invariant as bi

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# A test takes many examples; the budget of the suite is minutes.
quick = settings(max_examples=40, deadline=None, derandomize=True)


def same(call: Callable[[], Any]) -> None:
    """The call gives the same with the mode on as without: result or kind of error."""
    try:
        want, error = call(), None
    except (RuntimeError, IndexError, ValueError, TypeError) as found:
        want, error = None, found
    empty = isinstance(want, torch.Tensor) and not want.numel()
    with bi.enabled():
        if error is not None:
            with pytest.raises((RuntimeError, IndexError, ValueError, TypeError)):
                call()
            return
        try:
            got = call()
        except RuntimeError:
            # Torch checks some arguments only when there is something to compute; we always do.
            assert empty
            return
    if isinstance(want, torch.Tensor):
        want, got = (want,), (got,)
    for w, g in zip(want, got, strict=True):
        assert g.shape == w.shape
        assert g.dtype == w.dtype
        assert g.device == w.device
        rough = {torch.bfloat16: 2e-2, torch.float16: 4e-3}.get(w.dtype, 1e-4)
        torch.testing.assert_close(g, w, rtol=rough, atol=rough, equal_nan=True)


@st.composite
def tensors(draw: st.DrawFn, min_rank: int = 0, max_rank: int = 4) -> torch.Tensor:
    """Tensors of any rank, also empty ones, in any layout: strided, expanded, sliced."""
    shape = draw(
        st.lists(st.sampled_from([0, 1, 2, 3, 5, 17]), min_size=min_rank, max_size=max_rank)
    )
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    layout = draw(st.sampled_from(["plain", "transposed", "expanded", "stepped"]))
    if layout == "stepped":
        x = torch.randn([2 * n for n in shape], generator=generator).to(dtype)
        return x[tuple(slice(None, None, 2) for _ in shape)]
    x = torch.randn(shape, generator=generator).to(dtype)
    if layout == "transposed" and len(shape) >= 2:
        return x.transpose(0, -1)
    if layout == "expanded" and shape:
        return x[..., :1].expand(*shape[:-1], shape[-1]) if shape[-1] else x
    return x


@st.composite
def dims(draw: st.DrawFn, rank: int) -> Any:
    """None, an int, or a list of dims, some of them out of range."""
    one = st.integers(-rank - 1, rank)
    return draw(st.one_of(st.none(), one, st.lists(one, max_size=3)))


@quick
@given(data=st.data(), x=tensors(), keepdim=st.booleans())
@pytest.mark.parametrize("name", ["sum", "mean", "var", "std", "logsumexp", "norm"])
def test_reductions(name: str, data: st.DataObject, x: torch.Tensor, keepdim: bool) -> None:
    dim = data.draw(dims(x.dim()))
    if name == "norm":
        order = data.draw(st.sampled_from([0, 1, 2, 3, 0.5, -1, float("inf"), -float("inf")]))
        same(lambda: torch.linalg.vector_norm(x, order, dim=dim, keepdim=keepdim))
    elif name in ("var", "std"):
        correction = data.draw(st.sampled_from([0, 1, 2, 5]))
        same(lambda: getattr(torch, name)(x, dim=dim, correction=correction, keepdim=keepdim))
    elif name == "logsumexp":
        if dim is not None and dim != []:
            same(lambda: torch.logsumexp(x, dim, keepdim))
    else:
        same(lambda: getattr(torch, name)(x, dim=dim, keepdim=keepdim))


@quick
@given(data=st.data(), x=tensors(), dtype=st.sampled_from([None, *DTYPES, torch.int64]))
@pytest.mark.parametrize("name", ["sum", "mean", "prod", "cumsum", "softmax", "log_softmax"])
def test_dtype_argument(
    name: str, data: st.DataObject, x: torch.Tensor, dtype: torch.dtype | None
) -> None:
    if name != "mean" and dtype == torch.int64:
        x = x.round()
    dim = data.draw(st.integers(-x.dim() - 1, x.dim()))
    same(lambda: getattr(torch, name)(x, dim=dim, dtype=dtype))


@quick
@given(x=tensors(), ints=st.booleans())
@pytest.mark.parametrize("name", ["sum", "prod", "mean", "argmax", "std", "var"])
def test_whole_tensor(name: str, x: torch.Tensor, ints: bool) -> None:
    value = (x * 3).long() if ints else x
    same(lambda: getattr(torch, name)(value))


@quick
@given(data=st.data(), x=tensors(min_rank=1))
@pytest.mark.parametrize("name", ["argmax", "topk"])
def test_selections(name: str, data: st.DataObject, x: torch.Tensor) -> None:
    dim = data.draw(st.integers(-x.dim(), x.dim() - 1))
    if name == "argmax":
        same(lambda: x.argmax(dim))
    else:
        k = data.draw(st.integers(0, x.size(dim) + 1))
        largest = data.draw(st.booleans())
        same(lambda: x.topk(k, dim, largest)[0])


def test_ties_go_to_the_lowest_index() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    with bi.enabled():
        assert x.argmax(1).tolist() == [1, 0]
        indices = x.topk(3).indices
        assert indices.tolist() == [[1, 2, 4], [0, 1, 2]]
        assert x.topk(2, largest=False).indices.tolist() == [[0, 3], [0, 1]]
        nan = torch.tensor([1.0, torch.nan, 5.0, torch.nan])
        assert nan.argmax() == 1
        assert nan.topk(3).indices.tolist() == [1, 3, 2]


@quick
@given(data=st.data())
@pytest.mark.parametrize("name", ["matmul", "linear", "bmm", "addmm", "baddbmm", "mv", "dot"])
def test_products(name: str, data: st.DataObject) -> None:
    size = st.sampled_from([0, 1, 2, 3, 17, 33])
    m, k, n, b = (data.draw(size) for _ in range(4))
    other = data.draw(st.sampled_from([k, k, k, k + 1]))  # now and then a mismatch
    dtype = data.draw(st.sampled_from([*DTYPES, torch.int64]))
    second = data.draw(st.sampled_from([dtype, dtype, dtype, torch.float32]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))

    def make(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        x = (3 * torch.randn(*shape, generator=g)).to(dtype)
        kind = data.draw(st.sampled_from(["plain", "transposed", "expanded"]))
        if kind == "transposed" and len(shape) >= 2:
            return x.mT.contiguous().mT
        if kind == "expanded" and len(shape) >= 2 and shape[-2]:
            return x[..., :1, :].expand(shape)
        return x

    if name == "matmul":
        left = data.draw(st.sampled_from([(k,), (m, k), (b, m, k), (1, m, k), (b, 1, m, k)]))
        right = data.draw(st.sampled_from([(other,), (other, n), (b, other, n), (2, 1, other, n)]))
        same(lambda x=make(*left), y=make(*right, dtype=second): x @ y)
    elif name == "linear":
        weight = make(n, other, dtype=second)
        bias = data.draw(st.sampled_from([None, make(n, dtype=second)]))
        x = make(*data.draw(st.sampled_from([(k,), (m, k), (b, m, k), (2, b, m, k)])))
        same(lambda: F.linear(x, weight, bias))
    elif name == "bmm":
        same(lambda x=make(b, m, k), y=make(b, other, n, dtype=second): torch.bmm(x, y))
    elif name in ("addmm", "baddbmm"):
        lead = () if name == "addmm" else (b,)
        addend = make(*data.draw(st.sampled_from([(n,), (m, n), (1, n), (1,)])))
        beta, alpha = data.draw(st.sampled_from([(1, 1), (0, 1), (2, 3), (0.5, -1)]))
        x, y = make(*lead, m, k), make(*lead, other, n)
        if not dtype.is_floating_point:
            beta, alpha = 1, 1
        same(lambda: getattr(torch, name)(addend, x, y, beta=beta, alpha=alpha))
    elif name == "mv":
        same(lambda x=make(m, k), y=make(other, dtype=second): torch.mv(x, y))
    else:
        same(lambda x=make(k), y=make(other, dtype=second): torch.dot(x, y))


@quick
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "group_norm"])
def test_norms(name: str, data: st.DataObject, dtype: torch.dtype) -> None:
    size = st.sampled_from([0, 1, 3, 4, 12, 65])
    rows, n, inner = data.draw(size), data.draw(size), data.draw(size)
    x = torch.randn(rows, n, inner).to(dtype)
    x = data.draw(st.sampled_from([x, x.mT, x.expand(2, *x.shape)]))
    affine = data.draw(st.booleans())
    if name == "group_norm":
        groups = data.draw(st.sampled_from([1, 2, 3]))
        channels = x.size(1)
        parameters = (torch.randn(channels).to(dtype),) * 2 if affine else (None, None)
        same(lambda: F.group_norm(x, groups, *parameters, 1e-5))
        return
    shape = x.shape[-data.draw(st.sampled_from([1, 2])) :]
    weight = torch.randn(shape).to(dtype) if affine else None
    if name == "rms_norm":
        eps = data.draw(st.sampled_from([None, 1e-6]))
        same(lambda: F.rms_norm(x, shape, weight, eps))
    else:
        same(lambda: F.layer_norm(x, shape, weight, weight))


@quick
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_attention(data: st.DataObject, dtype: torch.dtype) -> None:
    size = st.sampled_from([1, 2, 3, 17])
    batch, queries, keys, heads = (data.draw(size) for _ in range(4))
    ratio = data.draw(st.sampled_from([1, 2]))
    q = torch.randn(batch, heads * ratio, queries, 16).to(dtype)
    k = torch.randn(batch, keys, heads, 16).transpose(1, 2).to(dtype)
    v = torch.randn(batch, heads, keys, 8).to(dtype)
    kind = data.draw(st.sampled_from(["none", "causal", "bool", "additive"]))
    mask = None
    if kind in ("bool", "additive"):
        mask = torch.rand(data.draw(st.sampled_from([(queries, keys), (batch, 1, 1, keys)]))) > 0.4
        mask[..., 0] = True
        if kind == "additive":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf).to(dtype)
    scale = data.draw(st.sampled_from([None, 0.3]))
    same(
        lambda: F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=kind == "causal", scale=scale, enable_gqa=ratio > 1
        )
    )


def test_attention_dropout_is_refused() -> None:
    x = torch.randn(1, 2, 3, 8)
    with bi.enabled(), pytest.raises(RuntimeError, match=r"dropout_p=0\.5; dropout draws"):
        F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


def test_softmax_of_masked_rows_is_as_in_torch() -> None:
    x = torch.randn(4, 9)
    x[0] = -torch.inf
    x[1, 3] = torch.inf
    x[2, 4] = torch.nan
    for name in ("softmax", "log_softmax", "logsumexp"):
        same(lambda name=name: getattr(torch, name)(x, -1))


def test_functional_rms_norm_with_residual() -> None:
    x, r, w = torch.randn(5, 64), torch.randn(5, 64), torch.randn(64)
    out, total = bi.rms_norm(x, w, 1e-6, residual=r)
    assert torch.equal(total, x + r)
    torch.testing.assert_close(out, F.rms_norm(x + r, (64,), w, 1e-6))
    part = bi.rms_norm(x, w, 1e-6, variance_size=16)
    scale = (x[:, :16].square().mean(1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(part, x * scale * w)
    with pytest.raises(RuntimeError, match=r"variance_size must be in 1\.\.64, got 65"):
        bi.rms_norm(x, w, variance_size=65)
    with pytest.raises(RuntimeError, match=r"expected weight of shape \[64\], got \[3\]"):
        bi.rms_norm(x, torch.randn(3))


@pytest.mark.parametrize("left", [(5,), (4, 5), (2, 4, 5), (3, 1, 4, 5)])
@pytest.mark.parametrize("right", [(5,), (5, 6), (2, 5, 6), (3, 2, 5, 6)])
def test_functional_matmul_for_every_pair_of_ranks(
    left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    a, b = torch.randn(left), torch.randn(right)
    torch.testing.assert_close(bi.matmul(a, b), torch.matmul(a, b))


def test_functional_matmul_refuses_what_torch_refuses() -> None:
    with pytest.raises(RuntimeError, match="at least 1D"):
        bi.matmul(torch.ones(()), torch.ones(3))
    with pytest.raises(RuntimeError, match="inner sizes"):
        bi.matmul(torch.ones(2, 3), torch.ones(2, 3))


@pytest.mark.parametrize("shape", [(70, 33), (3, 40, 17), (2, 1100, 16), (2, 3, 50, 4, 5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_middle_dimensions_have_the_bits_of_the_last(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Walking down columns and along rows is one order."""
    x = torch.randn(shape).to(dtype)
    for dim in range(x.dim() - 1):
        rows = x.movedim(dim, -1).contiguous()
        for call in (
            bi.sum,
            bi.mean,
            bi.var,
            bi.norm,
            lambda t, d: bi.norm(t, 3, d),
            lambda t, d: bi.norm(t, float("inf"), d),
        ):
            if call is bi.norm:
                got, want = bi.norm(x, 2, dim), bi.norm(rows, 2, -1)
            else:
                got, want = call(x, dim), call(rows, -1)
            assert torch.equal(got, want)
        assert torch.equal(bi.cumsum(x, dim).movedim(dim, -1), bi.cumsum(rows, -1))
