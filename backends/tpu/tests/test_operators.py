"""The operators of core's contracts by these kernels, beside the CPU reference."""

import math
from typing import Any

import pytest
import torch

from batch_invariant import registry
from batch_invariant.errors import BackendUnavailable, OpNotSupported
from batch_invariant.ops import CONTRACTS
from batch_invariant.ops.bits import mismatch
from batch_invariant.ops.contract import Case, Data, Draw
from batch_invariant.proof.subject import widened
from batch_invariant_tpu.torchtpu import run

EXACT = ("prod", "var", "std", "norm", "group_norm", "cumsum", "argmax", "topk", "embedding")
FUNCTIONS = "exp log rsqrt sin cos tanh erf sigmoid silu gelu pow".split()


def _ours(name: str, args: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    backend = registry.load("tpu")
    native = {
        key: backend.to_native(value) if isinstance(value, torch.Tensor) else value
        for key, value in args.items()
    }
    out = CONTRACTS[name].call(backend.kernels()[name].fn, native)
    return tuple(backend.to_torch(array) for array in out)


def _theirs(name: str, args: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    return CONTRACTS[name].call(registry.load("cpu").kernels()[name].fn, args)


def _drawn(name: str, case: Case, dtype: torch.dtype, rows: int = 5) -> dict[str, Any]:
    draw = Draw(dtype, Data.CANCELLING, torch.Generator().manual_seed(0))
    return case.args(draw, rows)


def _same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> bool:
    return all(mismatch(a, b) is None for a, b in zip(ours, theirs, strict=True))


def test_every_operator_has_a_kernel() -> None:
    missing = {"attention", "grouped_mm", "sample"}  # declared gaps
    assert set(registry.load("tpu").kernels()) == set(CONTRACTS) - missing


@pytest.mark.parametrize("name", EXACT)
def test_the_bits_are_those_of_the_reference(name: str) -> None:
    for case in CONTRACTS[name].cases[:2]:
        args = _drawn(name, case, torch.float32)
        assert _same(_ours(name, args), _theirs(name, args)), case.label


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementwise_functions_are_exact_enough_and_alike_everywhere(name: str) -> None:
    op = CONTRACTS[name]
    case = op.cases[1]
    args = _drawn(name, case, torch.float32)
    (ours,) = _ours(name, args)
    exact = op.call(op.reference, widened(args))[0]
    bound = op.error_bound(**widened(args), dtype=torch.float32)
    assert ((ours.double() - exact).abs() <= bound).all()
    reversed_rows = {**args, "self": args["self"].flip(0)[:2]}
    assert _same(_ours(name, reversed_rows), (ours.flip(0)[:2],))


@pytest.mark.parametrize("order", [0, 1, math.inf, -math.inf])
def test_norms_of_other_orders(order: float) -> None:
    args = {"self": torch.randn(3, 1000), "ord": order, "dim": [1], "keepdim": True}
    assert _same(_ours("norm", args), _theirs("norm", args))


def test_a_norm_by_powers() -> None:
    x = torch.randn(3, 1000)
    (ours,) = _ours("norm", {"self": x, "ord": 3, "dim": [1], "keepdim": False})
    torch.testing.assert_close(ours, torch.linalg.vector_norm(x, 3, 1), rtol=1e-5, atol=0)


def test_nan_zeros_and_ties_in_selections() -> None:
    nan, inf = math.nan, math.inf
    x = torch.tensor([[1, nan, 2, nan], [-0.0, 0, -0.0, 0], [-inf, 3, 3, -1], [-5, -7, -5, inf]])
    for dim in (0, 1, None):
        args = {"self": x, "dim": dim, "keepdim": False}
        assert _same(_ours("argmax", args), _theirs("argmax", args))
    for largest in (True, False):
        args = {"self": x, "k": 3, "dim": 1, "largest": largest, "sorted": True}
        assert _same(_ours("topk", args), _theirs("topk", args))


def test_scalars_and_empty_tensors() -> None:
    one = torch.tensor(2.0)
    for name, args in (
        ("cumsum", {"dim": 0}),
        ("argmax", {"dim": None, "keepdim": False}),
        ("topk", {"k": 1, "dim": 0, "largest": True, "sorted": True}),
        ("prod", {"dim": None, "keepdim": False}),
        ("norm", {"ord": 2, "dim": None, "keepdim": False}),
    ):
        assert _same(_ours(name, {"self": one, **args}), _theirs(name, {"self": one, **args})), name
    none = {"self": torch.empty(2, 0), "dim": 1, "keepdim": False}
    assert _same(_ours("prod", none), _theirs("prod", none))
    assert _ours("exp", {"self": torch.empty(0, 3)})[0].shape == (0, 3)


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_beyond_the_table_is_an_error(index: int) -> None:
    args = {"weight": torch.ones(4, 2), "indices": torch.tensor([0, index])}
    with pytest.raises(IndexError, match=f"index {index} is out of range for a table of 4 rows"):
        _ours("embedding", args)


def test_an_index_that_jax_cannot_hold_is_an_error() -> None:
    with pytest.raises(OpNotSupported, match=r"below 2\^31"):
        registry.load("tpu").to_native(torch.tensor([2**31]))


def test_whole_numbers_are_no_values() -> None:
    with pytest.raises(OpNotSupported, match="takes float32 and bfloat16"):
        _ours("sum", {"self": torch.ones(3, 3, dtype=torch.int64), "dim": [1], "keepdim": False})


def test_indices_are_torchs_on_torchtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the device: int64 goes in as int32, and int32 comes out as int64."""
    from batch_invariant_tpu import torchtpu

    seen = []

    def operator(*_: Any) -> Any:
        return lambda *tensors: seen.extend(t.dtype for t in tensors) or (tensors[0], tensors[1])

    class OnTpu(torch.Tensor):
        @property
        def device(self) -> Any:
            return type("Device", (), {"type": "tpu"})

    monkeypatch.setattr(torchtpu, "_operator", operator)
    x = torch.ones(2).as_subclass(OnTpu)
    out = run("embedding", lambda: None, (x, torch.tensor([1]).as_subclass(OnTpu)), {})
    assert seen == [torch.float32, torch.int32]
    assert [t.dtype for t in out] == [torch.float32, torch.int64]


def test_the_mode_gets_overrides_for_elementwise_functions() -> None:
    overrides = registry.load("tpu").aten_overrides()
    assert len(overrides) == len(FUNCTIONS)
    for overload, fn in overrides.items():
        name, _, variant = overload.partition(".")
        assert getattr(getattr(torch.ops.aten, name), variant or "default")
        with pytest.raises(BackendUnavailable, match="tensors on cpu"):
            fn(None, torch.ones(2), *((2,) if name == "pow" else ()))
