"""Every operator, dtype and case of the reference backend under every transform, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import batch_invariant as bi
from batch_invariant import selector
from batch_invariant.ops import CONTRACTS
from batch_invariant.ops.contract import Data
from batch_invariant.proof.transforms import ROWS, variants
from batch_invariant.proof.verify import accuracy, compare, draw, verify

OPS = [(name, dtype) for name, op in CONTRACTS.items() for dtype in op.dtypes]


@pytest.mark.parametrize(("name", "dtype"), OPS, ids=lambda v: str(v).removeprefix("torch."))
def test_rows_keep_their_bits_and_values_their_bound(name: str, dtype: torch.dtype) -> None:
    (result,) = [r for r in verify("cpu", [name]) if r.dtype == str(dtype).removeprefix("torch.")]
    assert not result.breaks
    assert result.checks >= 30


def test_every_contract_has_a_kernel() -> None:
    assert set(selector.kernels("cpu")) == set(CONTRACTS)


@pytest.mark.parametrize(("name", "dtype"), OPS, ids=lambda v: str(v).removeprefix("torch."))
def test_bits_do_not_depend_on_threads(name: str, dtype: torch.dtype) -> None:
    op = CONTRACTS[name]
    kernel = selector.kernels("cpu")[name]
    threads = torch.get_num_threads()
    case = op.cases[0]
    args = draw(op, case, dtype, Data.CANCELLING)
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(op.call(kernel.fn, args))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(_bits(a), _bits(b))


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def test_a_kernel_broken_on_purpose_is_caught(broken_mm: str) -> None:
    results = list(verify(broken_mm, ["mm", "sum"]))
    broken = {r.op for r in results if not r.ok}
    assert broken == {"mm"}
    transforms = {found.transform for r in results for found in r.breaks}
    assert "T1 population" in transforms
    assert "T3 neighbours" in transforms


def test_a_wrong_value_is_caught_by_the_bound() -> None:
    op = CONTRACTS["mm"]
    args = draw(op, op.cases[0], torch.float32, Data.NORMAL)

    def run(call: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        return (bi.mm(call["self"], call["mat2"]) + 1.0,)

    assert "beyond the bound" in (accuracy(op, args, torch.float32, run) or "")


def test_one_changed_bit_is_caught() -> None:
    out = torch.randn(ROWS, 5)
    changed = out.clone()
    changed.view(torch.int32)[17, 3] ^= 1
    variant = next(v for v in variants({"x": out}, {"x": 0}) if v.label == "at another address")
    assert compare((out,), (out.clone(),), (0,), variant) is None
    assert (compare((out,), (changed,), (0,), variant) or "").startswith("row 17 changed in 1 of")


def test_signed_zeros_and_nans_are_compared_by_their_bits() -> None:
    variant = next(
        v
        for v in variants({"x": torch.zeros(ROWS, 1)}, {"x": 0})
        if v.label == "at another address"
    )
    zeros, nans = torch.zeros(ROWS, 1), torch.full((ROWS, 1), torch.nan)
    assert compare((zeros,), (-zeros,), (0,), variant) is not None
    assert compare((nans,), (nans.clone(),), (0,), variant) is None


def test_stock_torch_varies_somewhere_here() -> None:
    """The negative control of the whole suite: the same transforms catch plain torch.

    Stock matrix products change with the batch on every x86 CPU tried; where they do not, this
    fails and says so, rather than let the suite pass blindly.
    """
    results = verify("cpu", ["mm", "linear", "bmm"])
    assert any(result.stock for result in results), "plain torch kept its bits on this machine"
