"""Every override of ours on the real torch_npu: registered, hit by its real callers, and undone.

torch_npu, its dispatcher, its schemas and its autograd are real; CANN is a stub, so kernels that
would launch something are replaced by CPU ones before the backend looks. Nothing here says what an
NPU computes. Run by job.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_npu
from torch.nn import functional as F

import batch_invariant as bi
import npu_kernels
import npu_memory
from batch_invariant import mode as modes
from batch_invariant.cpu import CpuBackend
from batch_invariant_ascend import (
    aten,
    fused_attention,
    npu_attention,
    npu_matmul,
    npu_norm,
    npu_operators,
    tiers,
)
from batch_invariant_ascend.admission import same_bits
from batch_invariant_ascend.schemas import SCHEMAS

KEY = "PrivateUse1"
Tensor = torch.Tensor
_generator = torch.Generator().manual_seed(3)
X, W, B = (torch.randn(*s, generator=_generator) for s in ((9, 96), (40, 96), (40,)))
Y, Z = (torch.randn(*s, generator=_generator) for s in ((9, 3, 32), (9, 32, 5)))
OWN = {**npu_norm.OVERRIDES, **npu_matmul.OVERRIDES, **npu_attention.OVERRIDES}


@pytest.fixture(scope="session", autouse=True)
def _cpu_kernels() -> int:
    return npu_memory.install()


@pytest.fixture
def mode(_cpu_kernels: int) -> Iterator[None]:
    with bi.enabled():
        npu_kernels.log.clear()
        yield


def test_the_wheel_is_real() -> None:
    assert torch_npu.__version__.startswith("2.13.")
    registered = torch._C._dispatch_get_registrations_for_dispatch_key(KEY)
    assert sum(name.startswith("npu::") for name in registered) > 400
    assert not hasattr(torch_npu, "__fake__")
    assert torch._C._dispatch_dump("npu::npu_add_rms_norm").count("torch_npu/csrc") >= 1


def _normalized(schema: str) -> str:
    # Floats print as 1e-06 or 9.9999999999999995e-07, by version.
    text = re.sub(r"\d+(\.\d+)?e-\d+|\d+\.\d+|\d+\.(?=\D)", lambda m: repr(float(m[0])), schema)
    return text.replace('"', "'").removeprefix("npu::")


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: s.split("(")[0])
def test_assumed_schemas_are_its_own(schema: str) -> None:
    base, _, overload = schema.split("(")[0].partition(".")
    real = torch._C._dispatch_find_schema_or_throw(f"npu::{base}", overload)
    assert _normalized(str(torch._C.parse_schema(f"npu::{schema}"))) == _normalized(
        str(getattr(getattr(torch.ops.npu, base), overload or "default")._schema)
    )
    assert real is not None


def test_every_override_of_ours_has_a_schema_here() -> None:
    listed = {f"npu::{s.split('(')[0]}" for s in SCHEMAS}
    assert listed >= set(OWN) | set(npu_matmul.FORMATS)
    missing = sorted(set(OWN) - npu_operators.registered())
    assert not missing, f"torch_npu has no kernels for {missing}: these overrides do nothing"
    for name in aten.overrides():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", KEY)


def _keys_of(name: str) -> str:
    return next(
        (x for x in torch._C._dispatch_dump(name).splitlines() if x.startswith(f"{KEY}:")), ""
    )


def test_every_override_is_in_place_and_undone() -> None:
    """The dispatcher's own table, for every operator: ours while the mode is on, then as before."""
    with bi.enabled():
        plain, extra, composite = modes.overrides("npu")
        names = [f"aten::{n}" for n in (*plain, *extra, *composite)]
        names = [n for n in names if modes._runs_on(n.removeprefix("aten::"), KEY)]
        vendor = npu_operators.overrides()
        names += [n for n, fn in vendor.items() if fn is not None]
    before = {name: _keys_of(name) for name in names}
    with bi.enabled():
        for name in names:
            assert "batch_invariant/mode.py" in _keys_of(name), f"{name} is not overridden"
    assert {name: _keys_of(name) for name in names} == before
    assert len(names) > 100


def test_what_nobody_has_classified_is_refused(mode: None) -> None:
    known = npu_operators.overrides()
    for name in sorted(npu_operators.registered()):
        fn = known.get(name, "refused")
        if fn is None:
            assert "batch_invariant" not in _keys_of(name)
        else:
            assert "batch_invariant/mode.py" in _keys_of(name)
    with pytest.raises(bi.UncoveredOpError, match="npu::npu_ffn"):
        torch_npu.npu_ffn(X.npu(), X.mT.npu(), X.npu(), "relu")


def _out(fn: Callable[..., Any]) -> Callable[..., Tensor]:
    def call(*args: Tensor) -> Tensor:
        out = args[0].new_empty(0)
        fn(*args, out=out)
        return out

    return call


CALLS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "mm": (torch.mm, (X, W.mT)),
    "mm out=": (_out(torch.mm), (X, W.mT)),
    "mm out_dtype=": (
        lambda a, b: torch.mm(a, b, out_dtype=torch.float32),
        (X.half(), W.half().mT),
    ),  # not on a CPU
    "bmm": (torch.bmm, (Y, Z)),
    "bmm out=": (_out(torch.bmm), (Y, Z)),
    "addmm": (lambda a, w, b: torch.addmm(b, a, w), (X, W.mT, B)),
    "addmm out=": (lambda a, w, b: _out(torch.addmm)(b, a, w), (X, W.mT, B)),
    "baddbmm": (lambda a, b: torch.baddbmm(a[:, :, :5], a, b), (Y, Z)),
    "addbmm": (lambda a, b: torch.addbmm(a[0, :, :5], a, b), (Y, Z)),
    "mv": (lambda a, b: torch.mv(a, b[0]), (X, W)),
    "addmv": (lambda a, b: torch.addmv(a[:, 0], a, b[0]), (X, W)),
    "dot": (lambda a: torch.dot(a[0], a[1]), (X,)),
    "vdot": (lambda a: torch.vdot(a[0], a[1]), (X,)),
    "matmul 2-D": (torch.matmul, (X, W.mT)),
    "matmul out=": (_out(torch.matmul), (X, W.mT)),
    "matmul 3-D 2-D": (torch.matmul, (Y, Z[0])),
    "matmul 1-D": (lambda a, b: a[0] @ b, (X, W.mT)),
    "matmul broadcast": (lambda a, b: a[:, None] @ b, (Y[:3], Z)),
    "linear": (F.linear, (X, W)),
    "linear bias": (F.linear, (X, W, B)),
    "linear 3-D bias": (lambda a, w, b: F.linear(a[None], w, b), (X, W, B)),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), (Y, Z)),
    "inner": (torch.inner, (X, W)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 1), (X, W.mT)),
    "sum": (torch.sum, (X,)),
    "sum dtype=": (lambda x: x.half().sum(dtype=torch.float32), (X,)),
    "sum dim": (lambda x: x.sum(0), (X,)),
    "sum dims": (lambda x: torch.sum(x, (0, 1)), (X,)),
    "sum out=": (lambda x: _out(torch.sum)(x, 1), (X,)),
    "mean": (torch.mean, (X,)),
    "mean dim": (lambda x: x.mean(1, True), (X,)),
    "mean out=": (lambda x: _out(torch.mean)(x, 1), (X,)),
    "softmax": (lambda x: torch.softmax(x, 1), (X,)),
    "softmax dtype=": (lambda x: F.softmax(x.half(), 1, dtype=torch.float32), (X,)),
    "log_softmax": (lambda x: F.log_softmax(x, 1), (X,)),
    "cross_entropy": (lambda x: F.cross_entropy(x, x.argmax(1)), (X,)),
    "logsumexp": (lambda x: torch.logsumexp(x, 1), (X,)),
    "var": (lambda x: x.var(1), (X,)),
    "std": (lambda x: x.std(1), (X,)),
    "norm": (lambda x: x.norm(), (X,)),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x, 1, 1), (X,)),
    "prod": (lambda x: x[:, :9].prod(1), (X,)),
    "cumsum": (lambda x: x.cumsum(1), (X,)),
    "rms_norm": (lambda x: F.rms_norm(x, (96,)), (X,)),
    "layer_norm": (lambda x: F.layer_norm(x, (96,)), (X,)),
    "group_norm": (lambda x: F.group_norm(x.view(9, 6, 16), 3), (X,)),
    "attention": (
        lambda q: F.scaled_dot_product_attention(q[:, None], q[:, None], q[:, None]),
        (Y,),
    ),
    "argmax": (lambda x: x.argmax(1), (X,)),
    "topk": (lambda x: x.topk(3, 1)[0], (X,)),
    "F.embedding": (lambda x: F.embedding(torch.tensor([1, 2], device=x.device), x), (X,)),
}


@pytest.mark.parametrize("name", CALLS)
def test_call_is_caught(name: str) -> None:
    """None of the device's own sums runs, and the result is right against float64.

    Those sums are replaced by CPU kernels that write down their names, and that are wrong on
    purpose.
    """
    fn, arguments = CALLS[name]
    expected = None if name == "mm out_dtype=" else fn(*(a.double() for a in arguments))
    arguments = tuple(a.npu() for a in arguments)
    with bi.enabled():
        npu_kernels.log.clear()
        found = fn(*arguments).cpu()
    assert not npu_kernels.SUMS & set(npu_kernels.log)
    if expected is not None:
        torch.testing.assert_close(found.double(), expected.double(), rtol=2e-3, atol=1e-3)


def test_the_log_would_show_it() -> None:
    """The control: without the mode the same calls reach the device's own sums."""
    x = X.npu()
    npu_kernels.log.clear()
    torch.mm(x, W.mT.npu())
    x.sum(1)
    torch.softmax(x, 1)
    assert {"mm", "sum.dim_IntList", "_softmax"} <= npu_kernels.SUMS
    assert {"mm", "sum.dim_IntList", "_softmax"} <= set(npu_kernels.log)


GRADIENTS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "matmul": (torch.matmul, (X, W.mT)),
    "matmul 3-D 2-D": (torch.matmul, (Y, Z[0])),
    "matmul broadcast": (lambda a, b: a[:, None] @ b, (Y[:3], Z)),
    "matmul 1-D": (lambda a, b: a[0] @ b, (X, W.mT)),
    "matvec": (lambda a, b: a @ b[0], (X, W)),
    "linear": (F.linear, (X, W)),
    "linear bias": (F.linear, (X, W, B)),
    "softmax": (lambda x: F.softmax(x, 1), (X,)),
    "log_softmax": (lambda x: F.log_softmax(x, 1), (X,)),
    "rms_norm": (lambda x: F.rms_norm(x, (96,)), (X,)),
    "layer_norm": (lambda x: F.layer_norm(x, (96,)), (X,)),
    "attention": (
        lambda q: F.scaled_dot_product_attention(q[:, None], q[:, None], q[:, None]),
        (Y,),
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_backward_through_torch_npus_autograd(name: str) -> None:
    fn, arguments = GRADIENTS[name]
    exact = [a.double().requires_grad_() for a in arguments]
    weights = torch.randn(fn(*exact).shape, generator=torch.Generator().manual_seed(1))
    (fn(*exact) * weights).sum().backward()
    ours = [a.npu().requires_grad_() for a in arguments]
    with bi.enabled():
        npu_kernels.log.clear()
        (fn(*ours) * weights.npu()).sum().backward()
    assert not npu_kernels.SUMS & set(npu_kernels.log)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.grad.cpu().double(), b.grad, rtol=1e-3, atol=1e-3)


def test_fused_operators_by_every_name() -> None:
    from torch_npu import npu_add_rms_norm as imported_before

    x, g = X.bfloat16(), B[:1].expand(96).contiguous().bfloat16()
    expected = bi.rms_norm(x, g, 1e-5, residual=x)
    with bi.enabled():
        for fn in (
            imported_before,
            torch_npu.npu_add_rms_norm,
            torch.ops.npu.npu_add_rms_norm,
            torch.ops.npu.npu_add_rms_norm.default,
        ):
            y, rstd, s = fn(x.npu(), x.npu(), g.npu(), epsilon=1e-5)
            assert same_bits(y.cpu(), expected[0])
            assert same_bits(s.cpu(), expected[1])
            assert rstd.shape == (9, 1)
        with torch.inference_mode():
            y, _ = torch_npu.npu_rms_norm(x.npu(), g.npu(), 1e-5)
        assert same_bits(y.cpu(), bi.rms_norm(x, g, 1e-5))
        with pytest.raises(bi.OpNotSupported, match="VLLM_ASCEND_ENABLE_NZ=0"):
            torch_npu.npu_format_cast(x.npu(), 29)


def test_attention_by_both_versions() -> None:
    q, k = torch.randn(5, 4, 16), torch.randn(9, 2, 16)
    words = {"input_layout": "TND", "sparse_mode": 3, "num_key_value_heads": 2}
    ends, key_ends = [2, 5], [4, 9]
    with bi.enabled():
        one = torch_npu.npu_fused_infer_attention_score(
            *(t.npu() for t in (q, k, k)),
            num_heads=4,
            scale=0.25,
            actual_seq_lengths=ends,
            actual_seq_lengths_kv=key_ends,
            **words,
        )[0]
        two = torch_npu.npu_fused_infer_attention_score_v2(
            *(t.npu() for t in (q, k, k)),
            num_query_heads=4,
            softmax_scale=0.25,
            actual_seq_qlen=ends,
            actual_seq_kvlen=key_ends,
            **words,
        )[0]
        outs = [torch.empty_like(q).npu(), torch.empty(0).npu()]
        torch.ops.npu.npu_fused_infer_attention_score.out(
            *(t.npu() for t in (q, k, k)),
            num_heads=4,
            scale=0.25,
            actual_seq_lengths=ends,
            actual_seq_lengths_kv=key_ends,
            out=outs,
            **words,
        )
    assert same_bits(one.cpu(), two.cpu())
    assert same_bits(one.cpu(), outs[0].cpu())


SDPA = {
    "prefill": (7, {"is_causal": True}),
    "decode": (1, {}),
    "masked": (7, {"attn_mask": (torch.arange(12) % 3 != 1).expand(7, 12)}),
}


@pytest.mark.parametrize("name", SDPA)
def test_sdpa_is_called_as_the_fused_kernel_wants_it(name: str) -> None:
    """By torch_npu's own schema, and its own idea of the results' shapes and dtypes."""
    length, words = SDPA[name]
    for dtype in fused_attention.DTYPES:
        q = torch.empty(3, 4, length, 32, dtype=dtype, device="meta")
        k = torch.empty(3, 2, 12, 32, dtype=dtype, device="meta")
        mask = words.get("attn_mask")
        keep = None if mask is None else mask.expand(3, 1, length, 12).to("meta")
        out, lse = fused_attention.attend(
            torch.ops.npu.npu_fused_infer_attention_score, q, k, k, keep, name == "prefill", 0.5
        )
        assert (out.shape, out.dtype) == (q.shape, dtype)
        assert (lse.shape, lse.dtype) == (q.shape[:-1], torch.float32)
    with pytest.raises(RuntimeError, match="atten_masks"):  # the control: a name that it has not
        torch.ops.npu.npu_fused_infer_attention_score(q, k, k, atten_masks=keep)


@pytest.mark.parametrize("name", SDPA)
def test_sdpa_reaches_the_wheels_kernel_past_our_override(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tier A, which the stub of CANN refuses, with a CPU kernel in the place of torch_npu's."""
    called = []
    attention = CpuBackend().kernels()["scaled_dot_product_attention"].fn

    def kernel(query: Tensor, key: Tensor, value: Tensor, **words: Any) -> tuple[Tensor, Tensor]:
        called.append(words)
        mask = words.get("atten_mask")
        if words.get("sparse_mode") == 2:
            keep = torch.ones(query.size(2), key.size(2), dtype=torch.bool).tril()
        else:
            keep = None if mask is None else ~npu_memory.on_cpu(mask)
        tensors = [npu_memory.on_cpu(t) for t in (query, key, value)]
        out, lse = attention(*tensors, keep, scale=words["scale"], enable_gqa=True)
        return npu_memory.on_npu(out.contiguous()), npu_memory.on_npu(lse[..., None].contiguous())

    length, words = SDPA[name]
    words = {**words, "enable_gqa": True}
    q, k = (
        torch.randn(*s, generator=_generator).half() for s in ((3, 4, length, 32), (3, 2, 12, 32))
    )
    npu_words = {n: w.npu() if isinstance(w, Tensor) else w for n, w in words.items()}
    library = torch.library.Library("npu", "IMPL")
    library.impl("npu_fused_infer_attention_score", kernel, KEY, allow_override=True)
    try:
        for check in ("need_level_3", "check_level_3"):
            monkeypatch.setattr(fused_attention, check, lambda: None)
        chosen = tiers.Choice(tiers.Tier.A, fused_attention.native(""), ())
        monkeypatch.setattr(fused_attention, "choice", lambda: chosen)
        with bi.enabled():
            assert "mode.py" in _keys_of("npu::npu_fused_infer_attention_score")
            leaves = [t.npu().requires_grad_() for t in (q, k, k)]
            out = F.scaled_dot_product_attention(*leaves, **npu_words)
            out.float().sum().backward()
    finally:
        library._destroy()
    exact = F.scaled_dot_product_attention(*(t.double() for t in (q, k, k)), **words)
    torch.testing.assert_close(out.detach().cpu().double(), exact, rtol=2**-9, atol=2**-9)
    assert len(called) == 1
    assert leaves[0].grad is not None
    assert (called[0]["num_heads"], called[0]["num_key_value_heads"]) == (4, 2)


def test_switches_of_the_real_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    def state() -> object:
        core = torch_npu._C
        return (
            os.environ.get("HCCL_DETERMINISTIC"),
            torch_npu.npu._get_deterministic_level(),
            torch.are_deterministic_algorithms_enabled(),
            core._npu_getOption("ALLOW_INTERNAL_FORMAT") == b"enable",
            torch_npu.npu.matmul.allow_hf32,
        )

    monkeypatch.setenv("HCCL_DETERMINISTIC", "true")
    torch_npu.npu.config.allow_internal_format = True
    torch.npu.matmul.allow_hf32 = True
    before = state()
    assert before == ("true", 0, False, True, True)
    with bi.enabled():
        assert state() == ("strict", 1, True, False, False)
    assert state() == before
    torch_npu.npu.config.allow_internal_format = False
    torch.npu.matmul.allow_hf32 = False


def test_level_3_is_refused_with_its_own_reason() -> None:
    kernels = bi.current_backend("npu").kernels()
    assert kernels["mm"].source.startswith("D")
    assert any("A needs CANN >= 9.2.0" in why and "level(3)" in why for why in kernels["mm"].better)
