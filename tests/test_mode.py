"""The mode: every override is hit, every state is restored, what is not covered is refused."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import batch_invariant as bi
from batch_invariant import mode, stock

X, W = torch.randn(64, 1024), torch.randn(1024, 96)


def _invariant() -> bool:
    return torch.equal(X[:1].clone() @ W, (X @ W)[:1])


def test_on_and_off() -> None:
    before = X @ W
    assert not bi.is_enabled()
    bi.enable()
    bi.enable()
    assert bi.is_enabled()
    assert torch.equal(X @ W, bi.mm(X, W))
    bi.disable()
    assert not bi.is_enabled()
    assert torch.equal(X @ W, before)
    bi.disable()


def test_context_decorator_and_nesting() -> None:
    with bi.enabled():
        with bi.enabled():
            assert bi.is_enabled()
        assert bi.is_enabled()

        @bi.enabled()
        def inside() -> bool:
            return bi.is_enabled()

        assert inside()
    assert not bi.is_enabled()
    assert inside()
    assert not bi.is_enabled()


def test_a_context_restores_what_it_found() -> None:
    bi.enable()
    with bi.enabled():
        bi.disable()
        assert not bi.is_enabled()
    assert bi.is_enabled()
    bi.disable()
    with bi.enabled():
        bi.enable()
    assert not bi.is_enabled()


def test_exceptions_restore() -> None:
    with pytest.raises(ZeroDivisionError), bi.enabled():
        raise ZeroDivisionError
    assert not bi.is_enabled()


def test_overlapping_threads_keep_it_on_until_the_last_leaves() -> None:
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    seen: list[bool] = []

    def first() -> None:
        with bi.enabled():
            first_in.set()
            second_in.wait(10)
        first_out.set()

    def second() -> None:
        first_in.wait(10)
        with bi.enabled():
            second_in.set()
            first_out.wait(10)
            seen.append(bi.is_enabled() and _invariant())

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == [True]
    assert not bi.is_enabled()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_keeps_the_mode() -> None:
    expected = bi.sum(bi.mm(X, W)).item()
    with bi.enabled():
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            ok = bi.is_enabled() and (X @ W).sum().item() == expected
            os.write(write, b"1" if ok else b"0")
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read, 1) == b"1"
    os.close(read)
    os.close(write)


_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=_GPU)])


@on_each_device
def test_every_override_is_registered_where_torch_dispatches(device: str) -> None:
    """The kernel that the dispatcher finds is ours: no name is accepted in silence."""
    names = mode.plan(device).overridden
    assert {"mm", "linear", "sum.dim_IntList", "_softmax", "rms_norm"} <= names
    with bi.enabled():
        for name in names:
            found = torch._C._dispatch_dump_table(f"aten::{name}")
            (line,) = [e for e in found.splitlines() if e.startswith(f"{device.upper()}:")]
            assert "mode.py" in line, (name, line)
    for name in names:
        found = torch._C._dispatch_dump_table(f"aten::{name}")
        assert "mode.py" not in found, name


_CALLS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "mm": lambda x, w: torch.mm(x, w),
    "mm.out": lambda x, w: torch.mm(x, w, out=x.new_empty(0)),
    "addmm": lambda x, w: torch.addmm(x.new_ones(96), x, w),
    "addmm_": lambda x, w: x.new_ones(64, 96).addmm_(x, w),
    "bmm": lambda x, w: torch.bmm(x[None], w[None]),
    "baddbmm": lambda x, w: torch.baddbmm(x.new_ones(1, 64, 96), x[None], w[None]),
    "mv": lambda x, w: torch.mv(x, w[:, 0]),
    "dot": lambda x, w: torch.dot(w[:, 0], w[:, 0]),
    "addmv": lambda x, w: torch.addmv(x.new_ones(64), x, w[:, 0]),
    "linear": lambda x, w: F.linear(x, w.mT),
    "sum": lambda x, w: x.sum(),
    "sum.dim_IntList": lambda x, w: x.sum(1),
    "sum.IntList_out": lambda x, w: torch.sum(x, 1, out=x.new_empty(0)),
    "mean": lambda x, w: x.mean(),
    "mean.dim": lambda x, w: x.mean(-1, keepdim=True),
    "prod": lambda x, w: x.prod(),
    "prod.dim_int": lambda x, w: x.prod(1),
    "var.correction": lambda x, w: x.var(1),
    "std.correction": lambda x, w: x.std(),
    "var_mean.correction": lambda x, w: torch.var_mean(x, 1),
    "std_mean.correction": lambda x, w: torch.std_mean(x, 1),
    "linalg_vector_norm": lambda x, w: torch.linalg.vector_norm(x, dim=1),
    "norm.ScalarOpt_dim": lambda x, w: torch.ops.aten.norm.ScalarOpt_dim(x, 2, [1]),
    "logsumexp": lambda x, w: x.logsumexp(1),
    "logsumexp.out": lambda x, w: torch.logsumexp(x, 1, out=x.new_empty(0)),
    "cumsum": lambda x, w: x.cumsum(1),
    "cumsum_": lambda x, w: x.clone().cumsum_(1),
    "_softmax": lambda x, w: x.softmax(1),
    "_log_softmax": lambda x, w: x.log_softmax(1),
    "_softmax.out": lambda x, w: torch.softmax(x, 1, out=x.new_empty(0)),
    "native_layer_norm": lambda x, w: F.layer_norm(x, (1024,)),
    "native_group_norm": lambda x, w: F.group_norm(x, 4),
    "rms_norm": lambda x, w: F.rms_norm(x, (1024,)),
    "argmax": lambda x, w: x.argmax(1),
    "topk": lambda x, w: x.topk(3),
    "scaled_dot_product_attention": lambda x, w: F.scaled_dot_product_attention(w, w, w),
    "silu": lambda x, w: F.silu(x),
    "exp_": lambda x, w: x.clone().exp_(),
    "sigmoid.out": lambda x, w: torch.sigmoid(x, out=x.new_empty(0)),
}


_ON_CPU_ALONE = {"silu", "exp_", "sigmoid.out"}  # torch's own kernels for CUDA ignore the place


@pytest.mark.parametrize("name", _CALLS)
@pytest.mark.parametrize("grad", ["grad", "no_grad", "inference"])
@on_each_device
def test_what_users_call_reaches_the_override(
    device: str, name: str, grad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cpu" and name in _ON_CPU_ALONE:
        pytest.skip("not overridden there")
    real = mode.overrides
    hits: list[str] = []

    def spied(device: str, fault: object = None) -> tuple[mode.Overrides, ...]:
        def spy(key: str, fn: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                hits.append(key)
                return fn(*args, **kwargs)

            return call

        return tuple({k: spy(k, v) for k, v in table.items()} for table in real(device, fault))

    monkeypatch.setattr(mode, "overrides", spied)
    context = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
    }[grad]
    with bi.enabled(), context():
        _CALLS[name](X.to(device), W.to(device))
    assert name in hits


def test_an_uncovered_operator_is_refused_with_the_remedy() -> None:
    with bi.enabled():
        with pytest.raises(bi.UncoveredOpError, match=r"aten::_fft.*float32\[64, 1024\]"):
            torch.fft.rfft(X)
        with pytest.raises(bi.UncoveredOpError, match=r"enable\(allow=\['_fft_r2c'\]\)"):
            torch.fft.rfft(X)
    torch.fft.rfft(X)


def test_allow_lets_an_operator_through() -> None:
    before = torch.fft.rfft(X)
    with bi.enabled(allow=["_fft_r2c"]):
        assert torch.equal(torch.fft.rfft(X), before)
        with bi.enabled(), pytest.raises(bi.UncoveredOpError):
            torch.fft.rfft(X)
        assert torch.equal(torch.fft.rfft(X), before)


def test_allow_rejects_names_that_do_not_exist() -> None:
    with pytest.raises(bi.ConfigurationError, match="no operator is named frobnicate"):
        bi.enable(allow=["frobnicate"])
    with pytest.raises(bi.ConfigurationError, match="expected a list"):
        bi.enable(allow="mm")
    assert not bi.is_enabled()


def test_another_librarys_override_is_a_clash() -> None:
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm", lambda a, b: torch.zeros(1), "CPU")
    try:
        with pytest.raises(bi.OverrideClash, match="aten::mm is already overridden at CPU"):
            bi.enable()
        assert not bi.is_enabled()
    finally:
        library._destroy()
    with bi.enabled():
        assert _invariant()


def test_a_failed_install_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = X @ W

    def fail(rules: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(mode.inductor, "hold", fail)
    with pytest.raises(OSError, match="no"):
        bi.enable()
    assert not bi.is_enabled()
    assert torch.equal(X @ W, before)
    assert "mode.py" not in torch._C._dispatch_dump_table("aten::mm")


def test_integers_run_torchs_exact_kernels() -> None:
    ints = torch.arange(12).view(3, 4)
    calls: list[Callable[[], torch.Tensor]] = [
        lambda: ints.sum(1),
        lambda: ints.prod(1),
        lambda: ints.cumsum(1),
        lambda: ints @ ints.T,
        lambda: ints.argmax(1),
        lambda: ints.bool().sum(),
        lambda: ints.topk(2).values,
        lambda: torch.bmm(ints[None], ints.T[None]),
    ]
    expected = [call() for call in calls]
    with bi.enabled():
        for call, want in zip(calls, expected, strict=True):
            got = call()
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


def test_out_is_resized_cast_and_checked() -> None:
    with bi.enabled():
        out = torch.empty(0, dtype=torch.float64)
        torch.sum(X, 1, out=out)
        assert out.shape == (64,)
        with pytest.raises(RuntimeError, match="can't be cast"):
            torch.mm(X, W, out=torch.empty(64, 96, dtype=torch.int64))


def test_complex_numbers_are_refused_not_computed() -> None:
    z = torch.randn(4, 4, dtype=torch.complex64)
    with bi.enabled(), pytest.raises(bi.BatchInvariantError):
        z @ z


def test_stock_kernels_are_reachable_while_overridden() -> None:
    before = X @ W
    with bi.enabled():
        assert torch.equal(stock.stock("mm")(X, W), before)


def test_a_device_without_backend_is_refused_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Covered and uncovered operators alike say that the device has no backend."""
    monkeypatch.setenv("BATCH_INVARIANT_BACKEND", "asend")
    bi.use_backend(None)
    with bi.enabled():
        for call in (lambda: X @ W, lambda: X.exp(), lambda: torch.fft.rfft(X), lambda: X.sum()):
            with pytest.raises(bi.UnknownBackend, match="unknown backend 'asend'"):
                call()
        assert X.relu().shape == X.shape
    monkeypatch.delenv("BATCH_INVARIANT_BACKEND")
    bi.use_backend(None)
