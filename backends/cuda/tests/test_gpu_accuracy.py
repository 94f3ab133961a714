"""Attention on a GPU is no farther from float64 than stock torch: cases of the benchmark."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA GPU", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHAPES = (
    (2, 8, 2, 1024, 1024, 64, True),
    (1, 8, 2, 300, 1000, 128, False),
    (16, 8, 2, 1, 4096, 128, False),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("deviation", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_is_no_farther_from_float64_than_stock(
    dtype: torch.dtype,
    deviation: float,
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    found = importlib.import_module("accuracy").measure(dtype, deviation, shape)
    for op in ("scaled_dot_product_attention", "attention"):
        assert found[f"{op}, ratio of rms"] <= 1.0, found
