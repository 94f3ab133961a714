"""Compiled code on an NVIDIA GPU: rows do not see the batch, also in CUDA graphs, and trained.

Self-contained, for a machine that has torch, triton, transformers and both packages.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import batch_invariant as bi
from batch_invariant.ops.bits import mismatch

REASON = "" if torch.cuda.is_available() else "torch.cuda.is_available() is False"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON)]

N = 4096
ROWS = (1, 2, 3, 7, 16, 33, 64)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def cancelling(rows: int, dtype: torch.dtype) -> Tensor:
    half = torch.randn(rows, N // 2) * 2.0 ** torch.randint(-12, 12, (rows, N // 2))
    x = torch.cat([half, -half], 1)[:, torch.randperm(N)] + torch.randn(rows, N)
    return x.to("cuda", dtype)


def block(dtype: torch.dtype) -> Any:
    """Norms written four ways, a gated unit, rotations, a residual: what surrounds products."""
    scale = torch.randn(N, device="cuda", dtype=dtype)
    weight = torch.randn(256, N, device="cuda", dtype=dtype) / 64
    module = torch.nn.RMSNorm(N, eps=1e-6, device="cuda", dtype=dtype)

    def f(x: Tensor) -> tuple[Tensor, ...]:
        by_hand = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)
        gate = F.silu(x * 1.5 + scale) * by_hand + F.gelu(x, approximate="tanh")
        left, right = x.chunk(2, -1)
        turned = torch.cat((-right, left), -1) * scale.cos() + x * scale.sin()
        return (
            by_hand * scale,
            module(x),
            F.rms_norm(x, (N,), scale, 1e-6),
            bi.rms_norm(x, scale, 1e-6),
            F.layer_norm(x, (N,), scale),
            (gate + turned / 3 + 0.1 * x - scale).softmax(-1),
            F.linear(gate, weight).logsumexp(-1),
        )

    return f


def broken(compiled: Any, x: Tensor) -> list[str]:
    """Which outputs of how many rows are not what they are among all of them."""
    whole = [y.clone() for y in compiled(x)]
    found = []
    for m in ROWS:
        torch.compiler.cudagraph_mark_step_begin()
        for i, (got, expected) in enumerate(zip(compiled(x[:m].clone()), whole, strict=True)):
            if (wrong := mismatch(got, expected[:m])) is not None:
                found.append(f"output {i} of {m} rows: {wrong}")
    return found


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("mode", ["dynamic", "static", "reduce-overhead", "max-autotune"])
def test_rows_do_not_see_the_batch(dtype: torch.dtype, mode: str) -> None:
    f, x = block(dtype), cancelling(128, dtype)
    options: dict[str, Any] = {"dynamic": mode == "dynamic"}
    if mode not in ("dynamic", "static"):
        options = {"mode": mode}
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad(), bi.enabled():
        assert broken(torch.compile(f, fullgraph=True, **options), x) == []


def test_stock_compiled_code_does() -> None:
    f, x = block(torch.float32), cancelling(128, torch.float32)
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        assert broken(torch.compile(f, dynamic=False), x)


@DTYPES
def test_four_rms_norms_at_every_number_of_rows(dtype: torch.dtype) -> None:
    scale = torch.randn(N, device="cuda", dtype=dtype)
    module = torch.nn.RMSNorm(N, eps=1e-6, device="cuda", dtype=dtype)

    def f(x: Tensor) -> tuple[Tensor, ...]:
        by_hand = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        functional = bi.rms_norm(x, scale, 1e-6)
        return functional, module(x), F.rms_norm(x, (N,), scale, 1e-6), by_hand.to(dtype) * scale

    x = cancelling(64, dtype)
    with torch.no_grad(), bi.enabled():
        compiled = torch.compile(f, fullgraph=True, dynamic=True)
        whole = compiled(x)
        for m in range(1, 65):
            for got, expected in zip(compiled(x[:m].clone()), whole, strict=True):
                assert mismatch(got, expected[:m]) is None, m


@DTYPES
def test_eager_bits(dtype: torch.dtype) -> None:
    f, x = block(dtype), cancelling(33, dtype)

    def more(x: Tensor) -> tuple[Tensor, ...]:
        y = x.roll(1, 0)
        return (
            *f(x),
            (x * y + scale - x / y * 3.0) * 0.3 + y / 7,
            torch.where(x > y, x.abs() - y, y.floor() * 0.7).to(torch.float16).to(dtype) + x,
            F.softplus(x).sqrt() + x.sigmoid().log() + (x.tanh().exp() - y).erf(),
            x.addcmul(y, scale, value=0.3).lerp(y, 0.7) + x.add(y, alpha=0.1),
        )

    scale = torch.randn(N, device="cuda", dtype=dtype)
    with torch.no_grad(), bi.enabled(eager_bits=True):
        for dynamic in (False, True):
            torch._dynamo.reset()
            got = torch.compile(more, fullgraph=True, dynamic=dynamic)(x)
            wrong = [mismatch(a, b) for a, b in zip(got, more(x), strict=True)]
            assert wrong == [None] * len(wrong)


def test_a_pair_has_the_bits_of_its_parts() -> None:
    from batch_invariant_cuda.reduce import mean_square

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((3, 4096), (64, 1031), (2, 5, 32, 128), (1, 40000), (300, 128), (7, 1)):
            x = torch.randn(shape, device="cuda").mul(3).to(dtype)
            for keepdim in (True, False):
                parts = bi.mean(x.float().pow(2), -1, keepdim)
                for _ in range(2):  # the second call is a repeated launch
                    assert mismatch(mean_square(x, [-1], keepdim), parts) is None, (dtype, shape)
            assert mismatch(mean_square(x, [0], True), bi.mean(x.float().pow(2), 0, True)) is None


def test_graph_breaks_and_inference_mode() -> None:
    weight, bias = torch.randn(65, N, device="cuda"), torch.randn(65, device="cuda")

    def f(x: Tensor) -> Tensor:
        y = F.linear(x, weight, bias) * 3 + 1
        torch._dynamo.graph_break()
        return y.logsumexp(-1)

    x = cancelling(9, torch.float32)
    with bi.enabled(), torch.inference_mode():
        compiled = torch.compile(f)
        assert mismatch(compiled(x), f(x)) is None
        assert mismatch(compiled(x[:2].clone()), f(x)[:2]) is None


def test_exported_programs() -> None:
    model = torch.nn.Sequential(torch.nn.RMSNorm(N), torch.nn.Linear(N, 33)).cuda()
    x = cancelling(8, torch.float32)
    with bi.enabled(), torch.no_grad():
        rows = torch.export.Dim("rows", min=2)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},)).module()
        expected = model(x)
        assert mismatch(program(x[:3].clone()), expected[:3]) is None
        assert mismatch(torch.compile(program)(x[:3].clone()), expected[:3]) is None


def test_each_setting_has_its_own_graphs() -> None:
    f, x = block(torch.float32), cancelling(64, torch.float32)
    compiled = torch.compile(lambda x: f(x)[-1], dynamic=False)
    with torch.no_grad():
        stock = compiled(x)
        with bi.enabled():
            ours = compiled(x)
        assert mismatch(compiled(x), stock) is None
        with bi.enabled():
            assert mismatch(compiled(x), ours) is None
        assert mismatch(ours, stock) is not None
    counts = torch._dynamo.utils.counters["stats"]
    assert counts["unique_graphs"] == 2


def test_processes_with_the_mode_on_and_off_share_a_cache_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    script = """
    import sys, torch, batch_invariant as bi
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    x, w = torch.randn(33, 4096, device="cuda"), torch.randn(4096, 90, device="cuda")

    def f(x, w):
        return (x @ w).sum(-1) * 2

    def run(hits):
        torch._dynamo.reset()
        out = torch.compile(f)(x, w)
        assert counters["inductor"]["fxgraph_cache_hit"] == hits, counters["inductor"]
        return out

    if "first" in sys.argv:
        run(0)
    else:
        with bi.enabled():
            assert torch.equal(run(0), f(x, w))
        run(1)
        with bi.enabled():
            assert torch.equal(run(2), f(x, w))
    """
    for argument in ("first", "second"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), argument],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_training_is_the_same_from_run_to_run() -> None:
    weight = torch.randn(64, N, device="cuda", requires_grad=True)
    x = cancelling(96, torch.float32)

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(F.rms_norm(x, (N,)), weight), torch.arange(96).cuda() % 64)

    def gradient(fn: Any) -> Tensor:
        weight.grad = None
        fn(x).backward()
        assert weight.grad is not None
        return weight.grad.clone()

    with bi.enabled():
        compiled = torch.compile(loss, fullgraph=True)
        first = gradient(compiled)
        assert all(mismatch(gradient(compiled), first) is None for _ in range(3))


def test_a_llama_is_trained() -> None:
    import transformers

    config = transformers.LlamaConfig(**SIZES)
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    ids = torch.randint(0, 320, (8, 64), device="cuda")

    def losses(ids: Tensor) -> Tensor:
        scores = model(ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        each = F.cross_entropy(scores, ids[:, 1:].flatten(), reduction="none")
        return each.view(len(ids), -1).mean(-1)

    with bi.enabled():
        compiled, runs = torch.compile(losses, dynamic=False), []
        for _ in range(3):
            model.zero_grad()
            each = compiled(ids)
            each.mean().backward()
            runs.append([each.detach(), *(p.grad.clone() for p in model.parameters())])
        for run in runs[1:]:
            assert [mismatch(a, b) for a, b in zip(run, runs[0], strict=True)] == [None] * len(run)
        for rows in (1, 3):
            assert mismatch(compiled(ids[:rows].clone()), runs[0][0][:rows]) is None


SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def test_an_audit_finds_nothing_uncovered() -> None:
    f, x = block(torch.bfloat16), cancelling(3, torch.bfloat16)
    with torch.no_grad(), bi.enabled():
        report = bi.audit(torch.compile(f), x)
    assert report.ok, str(report)
    assert report.graphs == 1
    assert "batch_invariant_fused::mean_square" in {ran.op for ran in report.ran}


KERNELS = """
import torch, triton
import triton.language as tl

@triton.jit
def row_sums(x, out, N: tl.constexpr):
    row = tl.program_id(0)
    tl.store(out + row, tl.sum(tl.load(x + row * N + tl.arange(0, N)), 0))

def raw(x):
    out = x.new_empty(x.shape[0])
    row_sums[(x.shape[0],)](x, out, x.shape[1])  # launched
    return out * 2

@torch.library.triton_op("bi_test::row_sums", mutates_args={})
def as_operator(x: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(x.shape[0])
    torch.library.wrap_triton(row_sums)[(x.shape[0],)](x, out, x.shape[1])  # launched
    return out

def by_operator(x):
    return as_operator(x) * 2
"""


def test_triton_kernels_of_the_program_are_uncovered_unless_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels_of_a_program.py").write_text(KERNELS)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("kernels_of_a_program")
    x = torch.randn(5, 64, device="cuda")
    with torch.no_grad(), bi.enabled():
        for f, eager_name in ((module.raw, "row_sums"), (module.by_operator, "bi_test::row_sums")):
            for fn, name in ((f, eager_name), (torch.compile(f), "row_sums")):
                report = bi.audit(fn, x)
                (found,) = report.of("uncovered")
                assert found.op == name
                assert fn is not f or f is module.by_operator or "# launched" in found.place
                assert torch.allclose(report.result, x.sum(-1) * 2, atol=1e-4)
                with pytest.raises(bi.UncoveredOpError, match="row_sums"):
                    bi.audit(fn, x, strict=True)
                assert bi.audit(fn, x, strict=True, trusted=[name]).ok
