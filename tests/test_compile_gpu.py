"""Compiled code on an NVIDIA GPU: rows do not see the batch, also in CUDA graphs, and trained.

Self-contained, for a machine that has torch, triton and both packages; about a minute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import batch_invariant as bi
from batch_invariant import inductor
from batch_invariant.ops.bits import mismatch

REASON = "" if torch.cuda.is_available() else "torch.cuda.is_available() is False"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON)]

N = 4096
ROWS = (1, 2, 3, 7, 16, 33, 64)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(inductor, "COMPILED_ON", frozenset({"cpu", "cuda"}))
    torch._dynamo.reset()
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "static", "reduce-overhead"])
def test_rows_do_not_see_the_batch(dtype: torch.dtype, mode: str) -> None:
    f, x = block(dtype), cancelling(128, dtype)
    options: dict[str, Any] = {"dynamic": mode == "dynamic"}
    if mode == "reduce-overhead":
        options = {"mode": mode}
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad(), bi.enabled():
        assert broken(torch.compile(f, fullgraph=True, **options), x) == []


def test_stock_compiled_code_does() -> None:
    f, x = block(torch.float32), cancelling(128, torch.float32)
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        assert broken(torch.compile(f, dynamic=False), x)


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


def test_an_audit_finds_nothing_uncovered() -> None:
    f, x = block(torch.bfloat16), cancelling(3, torch.bfloat16)
    with torch.no_grad(), bi.enabled():
        report = bi.audit(torch.compile(f), x)
    assert report.ok, str(report)
    assert report.graphs == 1
