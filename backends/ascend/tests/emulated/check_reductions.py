"""torch.sum on the emulated device: the default-dim bug of a peer's patch and what came after it.

The peer replaced torch.sum by a function whose dim was -1 by default. Each test is one call that
its first version or one of the later ones got wrong (docs/ascend.md); expected bits are those of
the CPU reference, whose order over a row this tier shares.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import batch_invariant as bi
import npu_kernels
from batch_invariant_ascend.admission import same_bits

X = torch.randn(6, 5, 33, generator=torch.Generator().manual_seed(3))
pytestmark = pytest.mark.usefixtures("mode")


def _same_as_cpu(call: Any, x: torch.Tensor = X) -> None:
    npu_kernels.log.clear()
    found, expected = call(x.npu()), call(x)
    assert found.device.type == "npu"
    assert same_bits(found.cpu(), expected)
    assert not {"sum", "mean"} & set(npu_kernels.log)


@pytest.mark.parametrize(
    "call",
    [torch.sum, lambda x: x.sum(), lambda x: torch.sum(x, None), lambda x: x.sum(()), torch.mean],
    ids=["torch.sum", "Tensor.sum", "dim=None", "dim=()", "mean"],
)
def test_without_dim_everything_is_summed(call: Any) -> None:
    """The default-dim bug: a 2-D tensor lost its last dimension only."""
    _same_as_cpu(call)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_dim_not_only_the_last(dim: int) -> None:
    """First successor: AscendC's kernel takes the last dim only, and the others were an error."""
    _same_as_cpu(lambda x: torch.sum(x, dim))
    _same_as_cpu(lambda x: x.sum(dim, keepdim=True))


@pytest.mark.parametrize("dims", [(0, 1), [1, 2], [-1], (0, 1, 2), (2, 0)])
def test_lists_of_dims(dims: Any) -> None:
    """Second successor: the kernel takes one int."""
    _same_as_cpu(lambda x: torch.sum(x, dims))
    _same_as_cpu(lambda x: x.mean(dims, keepdim=True))


def test_keywords() -> None:
    """Third successor: dtype=, axis= and out= were TypeErrors."""
    _same_as_cpu(lambda x: torch.sum(x.bfloat16(), -1, dtype=torch.float32))
    _same_as_cpu(lambda x: x.bfloat16().sum(dtype=torch.float32))
    _same_as_cpu(lambda x: torch.sum(x, axis=1))
    _same_as_cpu(lambda x: torch.sum(x, 1, out=x.new_empty(0)))
    _same_as_cpu(lambda x: torch.sum(x, dim=-1, keepdim=True))


def test_the_method_is_the_function() -> None:
    """Fourth successor: Tensor.sum was not replaced, and ran the vendor's kernel."""
    assert same_bits(X.npu().sum(-1).cpu(), torch.sum(X.npu(), -1).cpu())
    _same_as_cpu(lambda x: x.sum(-1))
    from torch import sum as imported

    _same_as_cpu(lambda x: imported(x, -1))


def test_integers_and_bools_are_exact_and_widen() -> None:
    """Fifth successor: int64 went to a kernel for floats."""
    whole = torch.arange(2**24, 2**24 + 30).view(5, 6)
    npu_kernels.log.clear()
    for x in (whole, whole.int(), whole % 2 == 0):
        found = x.npu().sum(-1)
        assert found.dtype is torch.int64
        assert torch.equal(found.cpu(), x.sum(-1))
        assert int(x.npu().sum()) == int(x.sum())
    assert float(whole.npu().sum(dtype=torch.float32)) == float(whole.sum(dtype=torch.float32))


def test_scalars_and_empty_tensors() -> None:
    _same_as_cpu(torch.sum, torch.tensor(2.5))
    _same_as_cpu(lambda x: torch.sum(x, 0), torch.tensor(2.5))
    _same_as_cpu(lambda x: torch.sum(x, 1), torch.ones(3, 0))
    _same_as_cpu(lambda x: torch.sum(x, 0), torch.ones(0, 3))
    assert torch.isnan(torch.ones(3, 0).npu().mean(1)).all()


@pytest.mark.parametrize("dim", [3, -4, (0, 5)])
def test_a_dim_that_is_not_there(dim: Any) -> None:
    """`d % x.dim()` would sum over another one."""
    with pytest.raises(IndexError, match="Dimension out of range"):
        X.npu().sum(dim)
    with pytest.raises(RuntimeError, match="multiple times"):
        X.npu().sum((1, 1))


def test_a_dtype_without_arithmetic() -> None:
    with pytest.raises(bi.OpNotSupported, match="sum on Ascend takes float32"):
        X.double().npu().sum(-1)
    with pytest.raises(bi.OpNotSupported, match="complex64"):
        X.npu().sum(-1, dtype=torch.complex64)
