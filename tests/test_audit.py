"""`bi.audit` and `bi audit`: what really ran, and a planted bypass that it must find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass

import batch_invariant as bi
from batch_invariant.cli import main
from compiler import needs_compiler

WEIGHT = torch.randn(33, 200)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def f(x: Tensor) -> Tensor:
    h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * 1.5  # the norm
    return F.linear(h, WEIGHT).softmax(-1)


def kinds(report: Any) -> dict[str, str]:
    return {ran.op: ran.verdict.kind for ran in report.ran}


class Bypass(CustomGraphPass):
    """A pass such as peers have: it puts torch's mean where the invariant one was."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(
            op="call_function", target=torch.ops.batch_invariant.mean.default
        ):
            with graph.inserting_after(node):
                stock = graph.call_function(torch.ops.aten.mean.dim, (node.args[0], [-1], True))
            stock.meta = dict(node.meta)
            node.replace_all_uses_with(stock)
            graph.erase_node(node)

    def uuid(self) -> bytes:
        return b"bypass"


def test_eager_code_with_the_mode_on_and_off() -> None:
    x = torch.randn(3, 200)
    for grad_mode in (torch.no_grad, torch.inference_mode):
        with grad_mode():
            with bi.enabled():
                on = bi.audit(f, x)
            off = bi.audit(f, x)
        assert on.ok
        assert on.result.shape == (3, 33)
        found = kinds(on)
        assert found["aten::mean.dim"] == found["aten::_softmax"] == "covered"
        assert kinds(off)["aten::mean.dim"] == kinds(off)["aten::mm"] == "uncovered"
        assert kinds(off)["aten::mul.Tensor"] == "harmless"
        assert not off.ok
    mean = next(ran for ran in on.ran if ran.op == "aten::mean.dim")
    assert str(mean.verdict) == "mean of cpu; schedule; lanes(1024, 8192)"
    assert mean.place.startswith(f"{__file__}:")
    assert mean.place.endswith("# the norm")
    with pytest.raises(bi.UncoveredOpError, match=r"aten::pow.*# the norm"):
        bi.audit(f, x, strict=True)
    with pytest.raises(bi.UncoveredOpError, match=r"aten::pow"):
        off.raise_if_uncovered()


def test_whole_numbers_allowed_operators_and_operators_of_others() -> None:
    x = torch.randn(4, 8)
    with bi.enabled(allow=["cumprod"]):
        report = bi.audit(lambda: (x > 0).sum(-1) + x.cumprod(-1).argmax(-1))
    assert kinds(report)["aten::cumprod"] == "uncovered"
    assert kinds(report)["aten::sum.dim_IntList"] == "harmless"
    assert kinds(report)["aten::argmax"] == "covered"
    with torch.library._scoped_library("bi_audit_test", "FRAGMENT") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CPU")
        with bi.enabled():
            report = bi.audit(torch.ops.bi_audit_test.double, x)
    assert kinds(report) == {"bi_audit_test::double": "uncovered"}


@pytest.mark.parametrize("name", ["aten", "batch_invariant"])
def test_an_override_that_comes_later_and_says_so(name: str) -> None:
    x, w = torch.randn(4, 8), torch.randn(8, 3)
    multiply = {"aten": torch.mm, "batch_invariant": bi.mm}[name]
    with bi.enabled():
        assert bi.audit(multiply, x, w).ok
        with torch.library._scoped_library(name, "IMPL") as library, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library.impl("mm", lambda a, b: (a[:, :, None] * b).sum(1), "CPU", allow_override=True)
            report = bi.audit(multiply, x, w)
        assert bi.audit(multiply, x, w).ok
    (wrong,) = report.of("uncovered")
    assert wrong.op == f"{name}::mm"
    assert "another library has put its own kernel" in wrong.verdict.why


@needs_compiler
def test_a_bypass_in_a_wrapper_that_calls_past_the_dispatcher() -> None:
    class Mm(Bypass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            own = torch.ops.batch_invariant.mm.default
            for node in graph.find_nodes(op="call_function", target=own):
                node.target = torch.ops.aten.mm.default

    x, w = torch.randn(7, 33), torch.randn(33, 5)
    with (
        bi.enabled(),
        torch.no_grad(),
        torch._inductor.config.patch(cpp_wrapper=True, post_grad_custom_pre_pass=Mm()),
    ):
        with pytest.raises(bi.UncoveredOpError, match="past the dispatcher"):
            torch.compile(torch.mm)(x, w)
        assert not bi.audit(torch.compile(torch.mm), x, w).ok


@needs_compiler
def test_compiled_code_and_a_planted_bypass() -> None:
    x = torch.randn(7, 200)
    compiled = torch.compile(f)
    with bi.enabled(), torch.no_grad():
        report = bi.audit(compiled, x)
        assert report.ok
        assert report.graphs == 1
        assert torch.equal(report.result, f(x))
        calls = {ran.op: ran.how for ran in report.ran}
        for op in ("batch_invariant::mean", "batch_invariant::linear", "aten::rsqrt"):
            assert calls[op] == "compiled call"
        assert {ran.verdict.kind for ran in report.ran if ran.how == "generated"} == {"harmless"}
        with torch._inductor.config.patch(post_grad_custom_pre_pass=Bypass()):
            torch._dynamo.reset()
            with pytest.raises(bi.UncoveredOpError, match=r"aten::mean.*\n?.*# the norm"):
                torch.compile(f)(x)
            with pytest.raises(bi.UncoveredOpError, match="Inductor generates a sum"):
                bi.audit(torch.compile(f), x, strict=True)
            found = bi.audit(torch.compile(f), x)
    (wrong,) = found.of("uncovered")
    assert wrong.how == "generated"
    assert wrong.origins == ("aten::mean.dim",)
    assert wrong.place.endswith("# the norm")
    assert "Inductor generates a sum over float32" in str(found)


@needs_compiler
def test_stock_compiled_code_is_not_covered() -> None:
    with torch.no_grad():
        report = bi.audit(torch.compile(f), torch.randn(7, 200))
    whys = [ran.verdict.why for ran in report.of("uncovered")]
    assert any("Inductor generates a sum over float32" in why for why in whys)
    assert any("the mode is off" in why for why in whys)
    assert not bi.is_enabled()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    text = """
    import sys, torch
    print("arguments:", *sys.argv[1:])
    assert __name__ == "__main__"
    y = torch.randn(3, 8).sum(-1)
    if "fail" in sys.argv:
        raise SystemExit(3)
    """
    path.write_text(textwrap.dedent(text))
    return path


def test_the_command(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(script)]) == 1
    out = capsys.readouterr().out
    assert "NOT covered: 1 places; the mode was off: bi audit --enable turns it on" in out
    assert f"{script}:5  y = torch.randn(3, 8).sum(-1)" in out
    assert main(["audit", "--enable", str(script), "a", "--b"]) == 0
    out = capsys.readouterr().out
    assert "arguments: a --b" in out
    assert "everything that ran is covered or harmless" in out
    assert main(["audit", "--enable", "--json", str(script)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert {"aten::sum.dim_IntList"} < {ran["op"] for ran in found["ran"]}
    assert main(["audit", "--enable", str(script), "fail"]) == 1
    assert "exit code 3" in capsys.readouterr().err
    assert main(["audit", "--strict", str(script)]) == 1
    assert "UncoveredOpError" in capsys.readouterr().err
    assert main(["audit", "--strict", "--json", str(script)]) == 1
    assert not json.loads(capsys.readouterr().out)["ok"]
    assert main(["audit", str(script) + ".missing"]) == 2


def test_a_triton_kernel_of_the_program(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    text = """
    import torch, triton
    import triton.language as tl

    @triton.jit
    def add_up(x, out, N: tl.constexpr):
        tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), 0))

    out = torch.empty(1)
    add_up[(1,)](torch.ones(8), out, 8)  # the launch
    print("it is", int(out))
    """
    path.write_text(textwrap.dedent(text))

    def audit(*options: str) -> tuple[int, str]:
        command = "import sys; from batch_invariant.cli import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", command, "audit", "--enable", "--strict", *options, str(path)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TRITON_INTERPRET": "1"},  # no GPU is here: wiring alone
        )
        return done.returncode, done.stdout + done.stderr

    code, out = audit()
    assert code == 1
    assert "add_up" in out
    assert f"{path}:10  add_up[(1,)](torch.ones(8), out, 8)  # the launch" in out
    assert "it is 8" not in out
    code, out = audit("--trust", "add_up")
    assert code == 0, out
    assert "it is 8" in out
    assert "trusted by who asked" in out
