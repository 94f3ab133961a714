"""Code under torch.compile keeps the promise, with the bits of eager code, on CPU."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import compile_fx as module
from torch._inductor.compile_fx import make_boxed_func

import batch_invariant as bi
from batch_invariant.inductor import compile_fx, rules
from batch_invariant.ops.bits import bits, mismatch
from compiler import needs_compiler


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def counting(compiled: list[int]) -> Callable[..., Any]:
    """A backend that runs the graph as it is, and counts."""

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    return backend


def cancelling(rows: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows whose large terms cancel: an order of additions that changes shows."""
    half = torch.randn(rows, n // 2) * 2.0 ** torch.randint(-12, 12, (rows, n // 2))
    small = torch.randn(rows, n - 2 * (n // 2))
    x = torch.cat([half, -half, small], 1)[:, torch.randperm(n)]
    return (x + torch.randn(rows, n)).to(dtype)


@needs_compiler
def test_four_rms_norms_and_a_product_do_not_see_the_batch() -> None:
    n = 1031
    module, weight = torch.nn.RMSNorm(n, eps=1e-6), torch.randn(33, n)
    scale = torch.randn(n)
    torch.nn.init.normal_(module.weight)

    def f(x: Tensor) -> tuple[Tensor, ...]:
        norms = (
            bi.rms_norm(x, scale, 1e-6),
            module(x),
            F.rms_norm(x, (n,), scale, 1e-6),
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * scale,
        )
        return (*norms, F.linear(x, weight), F.layer_norm(x, (n,), scale), x.softmax(-1))

    x = cancelling(64, n)
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    with torch.no_grad():
        with bi.enabled():
            whole = f(x)
            for m in range(1, 65):
                for got, expected in zip(compiled(x[:m].clone()), whole, strict=True):
                    assert mismatch(got, expected[:m]) is None, m
        alone, among = compiled(x[:1].clone()), compiled(x)
        assert any(not torch.equal(a, b[:1]) for a, b in zip(alone, among, strict=True))


@needs_compiler
def test_exact_loops_have_the_bits_of_eager_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def f(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        half = torch.cat((-c[:, 37:74], a[:, :37]), -1)
        return (
            (a * b + c - a / c * 3.0) * 0.3 + b,
            a[:, :74] * b[:, :74] + half * c[:, :74],
            (a.t() * b.t() + c.t()).contiguous(),
            torch.where(a > b, a.abs() - c, b.floor() * 0.7).to(torch.float16).to(a.dtype) + a,
            F.silu(a * 1.5 + c) * b + (a * a + 1).rsqrt() + torch.relu(c - b) + a.clamp(-1, 1),
        )

    def run(dtype: torch.dtype, dynamic: bool, rows: tuple[int, ...]) -> int:
        """How many values differ from eager code, NaN apart, whose payload is not promised."""
        count = 0
        given = [specials(129, 75).to(dtype) for _ in range(3)]
        torch._dynamo.reset()
        compiled = torch.compile(f, dynamic=dynamic)
        for m in rows:
            inputs = [t[:m].clone() for t in given]
            for got, expected in zip(compiled(*inputs), f(*inputs), strict=True):
                differs = bits(got) != bits(expected)
                count += int((differs & ~(got.isnan() & expected.isnan())).sum())
        return count

    with bi.enabled():
        assert run(torch.bfloat16, True, (2, 3, 17, 64, 129)) == 0
        assert run(torch.float32, False, (129,)) == 0
        monkeypatch.setattr(compile_fx, "EXACT", {})
        assert run(torch.bfloat16, True, (129,)) > 0


def specials(rows: int, n: int) -> Tensor:
    """Random numbers with zeros of both signs, NaN, infinities, tiny and huge ones among them."""
    x = torch.randn(rows, n)
    flat = x.view(-1)
    for place, value in enumerate((0.0, -0.0, torch.nan, torch.inf, -torch.inf)):
        flat[place :: 17 + 2 * place] = value
    flat[5::13] *= 1e-40
    flat[6::11] *= 1e30
    return x


@needs_compiler
def test_training_has_the_gradients_of_eager_code() -> None:
    layers = torch.nn.LayerNorm(100), torch.nn.Linear(100, 130), torch.nn.GELU()
    model = torch.nn.Sequential(*layers, torch.nn.Linear(130, 20)).to(torch.bfloat16)
    x = cancelling(2 * 7, 100, torch.bfloat16).view(2, 7, 100)

    def loss(x: Tensor) -> Tensor:
        scores = (model(x) * 1.7 - x[..., :20] / 3).flatten(0, 1)
        return F.cross_entropy(scores, torch.arange(14) % 20)

    def gradients(fn: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        value = fn(leaf)
        value.backward()
        found = [leaf.grad, *(p.grad for p in model.parameters())]
        return [value.detach(), *(g.clone() for g in found if g is not None)]

    with bi.enabled():
        eager = gradients(loss)
        compiled = torch.compile(loss, fullgraph=True)
        for found in (gradients(compiled), gradients(compiled)):
            assert [mismatch(a, b) for a, b in zip(found, eager, strict=True)] == [None] * 8


@needs_compiler
def test_options_graph_breaks_and_inference_mode() -> None:
    weight, bias = torch.randn(65, 1031), torch.randn(65)

    def f(x: Tensor) -> Tensor:
        y = F.linear(x, weight, bias) * 3 + 1
        torch._dynamo.graph_break()
        return y.logsumexp(-1)

    x = cancelling(9, 1031).to(torch.float32)
    for options in ({"mode": "max-autotune"}, {"options": {"shape_padding": True}}):
        compiled = torch.compile(f, **options)
        with bi.enabled(), torch.inference_mode():
            assert mismatch(compiled(x), f(x)) is None
            assert mismatch(compiled(x[:2].clone()), f(x)[:2]) is None


def test_what_is_refused_raises_with_the_line_of_user_code() -> None:
    def f(x: Tensor) -> Tensor:
        y = x + 1
        return torch.fft.rfft(y).abs()  # the line to be named

    with bi.enabled(), pytest.raises(bi.UncoveredOpError) as caught:
        torch.compile(f, fullgraph=True)(torch.randn(3, 8))
    message = str(caught.value)
    assert message.startswith("aten::_fft_r2c(float32[3, 8]")
    assert f"{__file__}:" in message
    assert "the line to be named" in message


@needs_compiler
def test_what_is_allowed_runs_torchs_own_kernel() -> None:
    compiled = torch.compile(lambda x: x.cumprod(-1) + 1, fullgraph=True)
    x = torch.rand(3, 8)
    expected = compiled(x)
    with bi.enabled(), pytest.raises(bi.UncoveredOpError, match="aten::cumprod"):
        compiled(x)
    with bi.enabled(allow=["cumprod"]):
        assert mismatch(compiled(x), expected) is None


@needs_compiler
def test_templates_of_inductor_are_refused() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)
    with bi.enabled(), torch.no_grad(), pytest.raises(bi.UncoveredOpError, match="template"):
        compiled(*(torch.randn(1, 1, 32, 16) for _ in range(3)))


def test_each_setting_has_its_own_graphs(install: Any) -> None:
    install(
        """
        from batch_invariant.cpu import CpuBackend

        class Plugin(CpuBackend):
            name = "othercpu"
        """,
        name="othercpu",
    )
    compiled: list[int] = []
    x, w = torch.randn(64, 1024), torch.randn(1024, 96)
    f = torch.compile(lambda x, w: x @ w, backend=counting(compiled))
    with bi.enabled():
        assert torch.equal(f(x, w), bi.mm(x, w))
        assert torch.equal(f(x, w), bi.mm(x, w))
        assert len(compiled) == 1
        with bi.use_backend("othercpu"):
            f(x, w)
            assert len(compiled) == 2
        f(x, w)
        assert len(compiled) == 2
    f(x, w)
    assert len(compiled) == 3
    with bi.enabled(allow=["_fft_r2c"]):
        f(x, w)
        assert len(compiled) == 4
    with bi.enabled():
        f(x, w)
    f(x, w)
    assert len(compiled) == 4


@needs_compiler
def test_a_pair_that_a_backend_has_a_kernel_for(install: Any) -> None:
    install(
        """
        import torch
        from batch_invariant.cpu import CpuBackend

        class Plugin(CpuBackend):
            name = "othercpu"

            def fused_kernels(self):
                def mean_square(x, dim, keepdim):
                    return torch.ops.batch_invariant.mean(x.float() * x.float(), dim, keepdim)

                return {"mean_square": mean_square}
        """,
        name="othercpu",
    )

    def f(x: Tensor) -> Tensor:
        wide, narrow = x.float(), x.to(torch.bfloat16)
        square = narrow * narrow  # of bf16, and so rounded: it stays
        return (wide * wide).mean(-1, keepdim=True) + square.mean(-1, keepdim=True) + wide

    x = cancelling(5, 1031, torch.bfloat16)
    users: list[torch.fx.Graph] = []
    compiled = torch.compile(f)
    with torch.no_grad(), bi.enabled():
        before = bi.audit(compiled, x)
        ours = torch._inductor.config.patch(post_grad_custom_pre_pass=users.append)
        with bi.use_backend("othercpu"), ours:
            after = bi.audit(compiled, x)
    assert len(users) == 1  # a pass of the user's runs as well
    name = "batch_invariant_fused::mean_square"
    assert [ran.op for ran in after.of("covered")].count(name) == 1
    assert name not in str(before)
    assert after.ok
    assert mismatch(after.result, before.result) is None


def test_eager_bits_are_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU has them anyway: here it is taken for a device whose functions any code computes alike.
    monkeypatch.setattr(rules.Device, "elementwise", True)
    targets: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(graph: Any, inputs: Any, **kwargs: Any) -> Any:
            targets.extend(str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        return module.compile_fx(graph, inputs, inner_compile=run)

    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x / 3, x / y, x / 0.1 + x, x.remainder(3), x // 2, x.exp() * y

    compiled = torch.compile(f, backend=backend)
    x, y = torch.randn(5, 70).to(torch.bfloat16), torch.rand(70)
    with torch.no_grad(), bi.enabled():
        compiled(x, y)
        assert "aten.div.Tensor" in targets
        targets.clear()
        with bi.enabled(eager_bits=True):
            got = compiled(x, y)
            assert [mismatch(a, b) for a, b in zip(got, f(x, y), strict=True)] == [None] * 6
        assert {"batch_invariant_aten.div.Scalar", "batch_invariant_aten.div.Tensor"} < {*targets}
        assert not {"aten.div.Tensor", "aten.exp.default"} & {*targets}
        targets.clear()
        compiled(x, y)
        assert not targets  # the graph of before


def test_only_graphs_of_this_setting_run_where_compiling_is_off() -> None:
    compiled: list[int] = []
    x, w = cancelling(64, 1024), torch.randn(1024, 96)
    f = torch.compile(lambda x, w: x @ w, backend=counting(compiled))
    f(x, w)
    with bi.enabled(), torch.compiler.set_stance("eager_on_recompile"):
        assert torch.equal(f(x, w), bi.mm(x, w))
    with bi.enabled(), torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError):
        f(x, w)
    assert len(compiled) == 1


def test_the_mode_does_not_change_inside_a_compiled_function() -> None:
    @torch.compiler.disable
    def left_out() -> None:
        bi.enable()

    def f(x: Tensor) -> Tensor:
        left_out()
        return x @ x.T

    def g(x: Tensor) -> Tensor:
        with bi.enabled():
            return x @ x.T

    for function in (f, g):
        with pytest.raises(bi.ConfigurationError, match="inside a compiled function"):
            torch.compile(function, backend="eager")(torch.randn(3, 3))
        assert not bi.is_enabled()


def test_torch_is_as_it_was() -> None:
    from torch._dynamo import eval_frame
    from torch._inductor.codegen.cpp import CppKernel

    def hooked() -> tuple[Any, ...]:
        hooks = eval_frame._callback_from_stance, module.compile_fx
        return *hooks, CppKernel.cache_dtype_convert

    before = hooked()
    with bi.enabled():
        assert hooked() != before
    assert hooked() == before


def test_exported_programs() -> None:
    model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 33))
    x = cancelling(8, 64)
    with bi.enabled(), torch.no_grad():
        rows = torch.export.Dim("rows", min=2)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
        assert mismatch(program.module()(x[:3]), model(x)[:3]) is None


@needs_compiler
def test_packages_of_aotinductor(tmp_path: Path) -> None:
    """A package keeps the operators that it was compiled with, whatever the mode is later."""
    layers = torch.nn.LayerNorm(1030), torch.nn.Linear(1030, 33), torch.nn.SiLU()
    model = torch.nn.Sequential(*layers)
    x = cancelling(40, 1030)
    rows = torch.export.Dim("rows", min=1, max=64)
    with torch.no_grad(), bi.enabled():
        expected = model(x)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
        file = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        package = torch._inductor.aoti_load_package(file)
        for m in (1, 2, 3, 17, 40):
            assert mismatch(package(x[:m]), expected[:m]) is None, m
    with torch.no_grad():
        assert mismatch(package(x[:3]), expected[:3]) is None
        assert mismatch(model(x), expected) is not None


def _process(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_processes_with_the_mode_on_and_off_share_a_cache_on_disk() -> None:
    # The cache is that of this session (conftest.py), and no other test compiles this function.
    head = """
    import sys, torch, batch_invariant as bi

    def f(x, w):
        return (x @ w).sum(-1) * 2

    torch.manual_seed(0)
    x, w = torch.randn(33, 1100), torch.randn(1100, 90)
    """
    _process(head + "\n    torch.compile(f)(x, w)\n")
    _process(
        head
        + """
    from torch._dynamo.utils import counters

    def hits():
        return counters["inductor"]["fxgraph_cache_hit"]

    with bi.enabled():
        g = torch.compile(f)
        assert torch.equal(g(x, w), f(x, w)) and hits() == 0
    stock = torch.compile(f)(x, w)
    assert hits() == 1
    torch._dynamo.reset()
    with bi.enabled():
        assert torch.equal(torch.compile(f)(x, w), f(x, w)) and hits() == 2
    """
    )


def test_enabling_imports_no_compiler() -> None:
    _process(
        """
    import sys, torch, batch_invariant as bi
    bi.enable()
    assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
    x, w = torch.randn(64, 1024), torch.randn(1024, 96)
    g = torch.compile(lambda x, w: x @ w, backend="eager")
    assert torch.equal(g(x[:1].clone(), w), bi.mm(x, w)[:1])
    bi.disable()
    assert torch._dynamo.eval_frame._callback_from_stance.__module__ == "torch._dynamo.eval_frame"
    """
    )
