"""sample on a GPU: the draws of the CPU for equal logits, and the bits of the noise and weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import batch_invariant as bi
from batch_invariant.ops.contract import FLOATS

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA GPU", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from batch_invariant.cpu import rows  # noqa: E402
from batch_invariant_cuda import sample  # noqa: E402

LENGTHS = (1, 3, 1000, 1024, 1025, 32000, 49152, 151936)
FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 50, "temperature": 0.7},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.02, "temperature": 1.3},
    "all": {"temperature": 0.8, "top_k": 200, "top_p": 0.95, "min_p": 0.001},
}


def logits(count: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    x = 3 * torch.randn(count, n, generator=torch.Generator().manual_seed(count * 7919 + n))
    return x.to(dtype)


@pytest.mark.parametrize("label", FILTERS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_draws_are_those_of_the_cpu(label: str, dtype: torch.dtype) -> None:
    for n in LENGTHS:
        for count in (1, 5, 64) if n < 151936 else (1, 16):
            x = logits(count, n, dtype)
            seeds = torch.arange(count) * 2**33 - 2**20
            positions = torch.arange(count) * 2**31
            want = bi.sample(x, seeds, positions, **FILTERS[label])
            got = bi.sample(x.cuda(), seeds.cuda(), positions.cuda(), **FILTERS[label])
            assert got.cpu().equal(want), (n, count)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_for_each_row(dtype: torch.dtype) -> None:
    count, n = 64, 32001
    x = logits(count, n, dtype)
    generator = torch.Generator().manual_seed(4)
    given = {
        "seeds": torch.randint(-(2**62), 2**62, (count,), generator=generator),
        "positions": torch.randint(0, 2**40, (count,), generator=generator),
        "temperature": torch.randint(0, 5, (count,), generator=generator) / 2,
        "top_k": torch.randint(0, 100, (count,), generator=generator),
        "top_p": torch.randint(0, 17, (count,), generator=generator) / 16,
        "min_p": torch.randint(0, 9, (count,), generator=generator) / 64,
    }
    want = bi.sample(x, **given)
    there = {name: value.cuda() for name, value in given.items()}
    got = bi.sample(x.cuda(), **there)
    assert got.cpu().equal(want)
    order = torch.randperm(count, generator=generator)
    moved = {name: value[order.cuda()] for name, value in there.items()}
    assert bi.sample(x.cuda()[order.cuda()], **moved).equal(got[order.cuda()])
    for row in range(0, count, 13):
        alone = {name: value[row : row + 1] for name, value in there.items()}
        assert bi.sample(x[row : row + 1].cuda(), **alone).equal(got[row : row + 1])
    assert not bi.sample(x.cuda(), **{**there, "seeds": there["seeds"] + 1}).equal(got)


def test_many_draws_of_one_row() -> None:
    """200,000 draws from flat rows: a last bit that differs in the noise shows as another draw."""
    x = torch.zeros(1, 997).expand(200_000, -1)
    seeds = torch.arange(200_000)
    want = bi.sample(x, seeds, 3, min_p=0.5)
    got = bi.sample(x.cuda(), seeds.cuda(), 3, min_p=0.5)
    assert int((got.cpu() != want).sum()) == 0
    with_ties = torch.randint(
        0, 2, (20_000, 997), generator=torch.Generator().manual_seed(1)
    ).half()
    want = bi.sample(with_ties, seeds[:20_000], 3, top_k=100)
    assert bi.sample(with_ties.cuda(), seeds[:20_000].cuda(), 3, top_k=100).cpu().equal(want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights_have_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    x = logits(16, 50_001, dtype).sort(dim=1, descending=True, stable=True).values
    heat = torch.linspace(0.05, 3.0, 16)
    assert sample.weights(x.cuda(), heat.cuda()).cpu().equal(rows.sample_weights(x, heat))


def test_special_values_and_parameters_out_of_range() -> None:
    nan, inf = math.nan, math.inf
    x = torch.tensor([[1, nan, 2], [-inf] * 3, [-inf, 0, -inf], [inf, 5, inf]]).repeat(500, 1)
    for filters in ({}, {"top_p": 0.9}, {"top_k": 2}, {"temperature": 0.0}):
        want = bi.sample(x, torch.arange(2000), 0, **filters)
        assert bi.sample(x.cuda(), torch.arange(2000).cuda(), 0, **filters).cpu().equal(want)
    flat = torch.zeros(5, 9, device="cuda")
    heat = torch.tensor([-1.0, nan, inf, 1.0, 1.0], device="cuda")
    share = torch.tensor([0.5, 0.5, 0.5, 2.0, 0.5], device="cuda")
    drawn = bi.sample(flat, 1, 1, temperature=heat, top_p=share)
    assert drawn[:4].tolist() == [-1] * 4
    assert drawn[4] >= 0


def test_it_can_be_captured_in_a_graph() -> None:
    x = logits(8, 32000, torch.bfloat16).cuda()
    seeds, positions = torch.arange(8, device="cuda"), torch.zeros(8, dtype=torch.int64).cuda()
    heat = torch.full((8,), 0.9, device="cuda")
    eager = [bi.sample(x, seeds, positions + step, heat, top_k=40) for step in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = bi.sample(x, seeds, positions, heat, top_k=40)
    for step in range(3):
        positions.fill_(step)
        graph.replay()
        assert captured.equal(eager[step])


def test_with_the_mode_on() -> None:
    x = logits(8, 5000, torch.float32).cuda()
    seeds = torch.arange(8, device="cuda")
    plain = bi.sample(x, seeds, 1, top_p=0.9)
    with bi.enabled():
        assert bi.sample(x, seeds, 1, top_p=0.9).equal(plain)
