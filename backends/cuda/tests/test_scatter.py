"""index_add and scatter_add as the CUDA backend computes them, on CPU tensors: values and errors.

The sums are exact, so every order has the same value: the order itself is checked on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from batch_invariant_cuda import scatter

OURS = scatter.overrides("CPU")


def whole_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1000, 1000, shape, generator=generator).double()


def places(most: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(1))


INDEX_ADD = {
    "rows": (whole_numbers(5, 7), 0, places(5, 40), whole_numbers(40, 7, seed=2)),
    "negative dim": (whole_numbers(3, 5, 4), -2, places(5, 20), whole_numbers(3, 20, 4, seed=2)),
    "last dim": (whole_numbers(3, 6), 1, places(6, 1), whole_numbers(3, 1, seed=2)),
    "int32": (whole_numbers(5), 0, places(5, 9).int(), whole_numbers(9, seed=2)),
    "strided": (whole_numbers(7, 5).t(), 0, places(5, 9), whole_numbers(7, 9, seed=2).t()),
    "a number": (whole_numbers(), 0, torch.tensor([0]), whole_numbers(seed=2)),
    "numbers": (whole_numbers(), -1, torch.tensor(0), whole_numbers(seed=2)),
    "one number": (whole_numbers(4), 0, torch.tensor(2), whole_numbers(1, seed=2)),
    "none": (whole_numbers(4, 2), 0, places(4, 0), whole_numbers(0, 2)),
    "empty slices": (whole_numbers(4, 0), 0, places(4, 3), whole_numbers(3, 0)),
}
SCATTER_ADD = {
    "rows": (whole_numbers(5, 7), 0, places(5, 40, 7), whole_numbers(40, 7, seed=2)),
    "smaller": (whole_numbers(5, 7, 3), -2, places(7, 4, 9, 2), whole_numbers(6, 9, 3, seed=2)),
    "strided": (whole_numbers(7, 5).t(), 0, places(5, 7, 9).t(), whole_numbers(9, 7, seed=2)),
    "a number": (whole_numbers(), 0, torch.tensor([0]), whole_numbers(1, seed=2)),
    "numbers": (whole_numbers(), -1, torch.tensor(0), whole_numbers(seed=2)),
    "one number": (whole_numbers(4), 0, torch.tensor(2), whole_numbers(seed=2)),
    "none": (whole_numbers(4, 2), 0, places(4, 0, 2), whole_numbers(3, 2)),
}
CASES = [
    *(("index_add", case, {}) for case in INDEX_ADD.values()),
    *(("index_add", case, {"alpha": -3}) for case in INDEX_ADD.values()),
    *(("scatter_add", case, {}) for case in SCATTER_ADD.values()),
]
LABELS = [
    *(f"index_add {label}" for label in INDEX_ADD),
    *(f"index_add {label} with alpha" for label in INDEX_ADD),
    *(f"scatter_add {label}" for label in SCATTER_ADD),
]


@pytest.mark.parametrize(("name", "case", "options"), CASES, ids=LABELS)
def test_every_overload_has_torchs_values(name, case, options):
    self, *args = case
    expected = getattr(torch, name)(self, *args, **options)
    before = self.clone()
    found = OURS[name](None, self, *args, **options)
    assert found.shape == expected.shape
    assert torch.equal(found, expected)
    assert torch.equal(self, before)
    out = torch.empty(0, dtype=self.dtype)
    assert OURS[f"{name}.out"](None, self, *args, **options, out=out) is out
    assert torch.equal(out, expected)
    assert OURS[f"{name}_"](None, before, *args, **options) is before
    assert torch.equal(before, expected)


@pytest.mark.parametrize("bad", [-1, 5])
def test_an_index_out_of_bounds_is_refused(bad):
    index = torch.tensor([0, bad, 1])
    with pytest.raises(RuntimeError, match="out of bounds for dimension 0 with size 5"):
        OURS["index_add"](None, whole_numbers(5, 2), 0, index, whole_numbers(3, 2))
    with pytest.raises(RuntimeError, match="out of bounds for dimension 0 with size 5"):
        OURS["scatter_add"](None, whole_numbers(5), 0, index, whole_numbers(3))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises((RuntimeError, IndexError)):
        OURS["index_add"](None, whole_numbers(5, 2), 0, places(5, 3), whole_numbers(4, 2))
    with pytest.raises((RuntimeError, IndexError)):
        OURS["scatter_add"](None, whole_numbers(5, 2), 0, places(5, 3, 3), whole_numbers(3, 3))
