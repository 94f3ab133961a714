"""Elementwise functions on CPU keep an element's bits wherever it stands, and torch's semantics."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batch_invariant.cpu import elementwise, vector_body
from batch_invariant.cpu.vector_body import body_of, tail_blocks
from batch_invariant.errors import UncoveredOpError
from batch_invariant.ops.bits import bits
from batch_invariant.stock import stock

_SCRIPT = Path(__file__).parents[1] / "benchmarks" / "elementwise_variance.py"
_spec = importlib.util.spec_from_file_location("elementwise_variance", _SCRIPT)
assert _spec is not None
assert _spec.loader is not None
variance: Any = importlib.util.module_from_spec(_spec)
sys.modules["elementwise_variance"] = variance
_spec.loader.exec_module(variance)

CALLS = {call.label: call for call in variance.calls()}
COVERED_CALLS = [
    label for label in CALLS if label.split(" ")[0] in {*elementwise.COVERED, *elementwise.LOSSES}
]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@contextmanager
def overridden() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    try:
        for name, fn in elementwise.overrides().items():
            library.impl(name, fn, "CPU", with_keyset=True)
        yield
    finally:
        library._destroy()


def _changes(label: str, dtype: torch.dtype) -> dict[str, int]:
    """Elements whose bits changed with their place, by context; a NaN's payload aside."""
    found: dict[str, int] = {}
    for special in (False, True):
        try:
            counts = variance.measure(CALLS[label], dtype, special)
        except NotImplementedError as error:
            pytest.skip(str(error))
        found |= {key: count for key, count in counts.items() if key != "NaN payload"}
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("label", COVERED_CALLS)
def test_bits_do_not_depend_on_an_elements_place(label: str, dtype: torch.dtype) -> None:
    with overridden():
        assert _changes(label, dtype) == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label", ["silu", "gelu approximate=tanh", "pow.Tensor_Scalar", "mish"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes(label: str, dtype: torch.dtype) -> None:
    with overridden():
        assert _changes(label, dtype) == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label", ["mul.Tensor", "div.Tensor", "addcmul", "neg", "angle"])
def test_complex_numbers(label: str) -> None:
    with overridden():
        assert _changes(label, torch.complex64) == {}


@pytest.mark.filterwarnings("ignore")
def test_the_measurement_sees_tails_that_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ("silu", "sigmoid", "mish", "pow.Tensor_Scalar", "sinh", "atan2")
    if not any(_changes(label, torch.float32) for label in labels):
        pytest.skip("on this CPU torch's tails have the bits of its vectors")
    monkeypatch.setattr(vector_body, "tail_blocks", lambda *_: None)
    with overridden():
        assert any(_changes(label, torch.float32) for label in labels)


@given(
    numel=st.integers(0, 200_000),
    threads=st.integers(1, 64),
    split=st.sampled_from([(32768, 32768), (2048, 2048), (16384, 1)]),
)
def test_tails_hold_every_position_outside_whole_vectors(
    numel: int, threads: int, split: tuple[int, int]
) -> None:
    shared_from, grain = split
    workers = min(threads, -(-numel // grain)) if numel > shared_from else 1
    chunk = max(-(-numel // workers), 1)
    expected = {
        i
        for start in range(0, numel, chunk)
        for stop in [min(start + chunk, numel)]
        for i in range(start + (stop - start) // 64 * 64, stop)
    }
    blocks = tail_blocks(numel, threads, split) or ()
    assert {int(i) for block in blocks for i in block} == expected
    # A block is computed by one thread in whole vectors.
    assert all(len(block) % 64 == 0 and len(block) <= 2048 for block in blocks)


@pytest.mark.parametrize("name", ["exp", "silu", "gelu", "tanh", "sigmoid", "cos", "sin", "rsqrt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_beside_any_other(name: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    shuffled = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    fn = body_of(name)
    together, apart = fn(every)[shuffled], fn(every[shuffled])
    same = (bits(together) == bits(apart)) | (together.isnan() & apart.isnan())
    assert same.all()


UNARY = ("silu", "exp", "rsqrt", "sigmoid", "gelu", "mish", "log1p", "atan")
BINARY = ("atan2", "hypot", "maximum", "pow.Tensor_Tensor", "xlogy.Tensor", "silu_backward")
SHAPES = ((), (0,), (5,), (70,), (3, 5), (2, 3, 4, 5))


def _op(name: str) -> Any:
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, base), overload or "default")


def _values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 4 + 0.1
    return x > 2 if dtype is torch.bool else x.to(dtype)


def _outcome(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return fn(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as error:
        return type(error), str(error).splitlines()[0]


def _assert_alike(ours: Any, torchs: Any, rtol: float = 2e-2) -> None:
    if not isinstance(torchs, torch.Tensor):
        assert ours == torchs
        return
    assert (ours.dtype, ours.shape) == (torchs.dtype, torchs.shape)
    if torchs.numel() > 1:
        assert ours.stride() == torchs.stride()
    torch.testing.assert_close(ours, torchs, rtol=rtol, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_errors_are_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for name in UNARY:
        x = _values(shape, dtype)
        inputs = [x, x.expand(2, *shape)]
        if len(shape) > 1:
            inputs += [x.transpose(0, -1), x[..., ::2]]
        if len(shape) == 4:
            inputs.append(x.contiguous(memory_format=torch.channels_last))
        for x in inputs:
            torchs = _outcome(_op(name), x)
            into = _outcome(_op(f"{name}.out"), x, out=torch.empty(0, dtype=torch.float64))
            with overridden():
                _assert_alike(_outcome(_op(name), x), torchs)
                ours = _outcome(_op(f"{name}.out"), x, out=torch.empty(0, dtype=torch.float64))
            _assert_alike(ours, into)


@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 5), (5,)), ((3, 1), (1, 5)), ((4,), ()), ((), (4,)), ((3,), (4,))],
    ids=str,
)
def test_broadcasting_and_promotion_are_torchs(
    left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)
    for name, a, b in itertools.product(BINARY[:-1], dtypes, dtypes):
        x, y = _values(left, a), _values(right, b, 1)
        torchs = _outcome(_op(name), x, y)
        with overridden():
            _assert_alike(_outcome(_op(name), x, y), torchs)


def test_in_place_writes_the_tensor_itself() -> None:
    for name, shape in itertools.product(("silu_", "exp_", "sqrt_"), SHAPES):
        for strided in (False, True):
            x = _values(shape, torch.float32)
            if strided and len(shape) > 1:
                x = x.transpose(0, -1)
            expected = body_of(name[:-1])(x)
            with overridden():
                assert _op(name)(x) is x
            assert torch.equal(bits(x), bits(expected))


@pytest.mark.parametrize("number", [2, -3, 0.3, -0.0, True, 1e-6, 1.5 + 2j], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 70)], ids=str)
def test_numbers_as_operands_have_torchs_bits(number: Any, shape: tuple[int, ...]) -> None:
    calls: dict[str, Callable[[torch.Tensor], Any]] = {
        "+": lambda x: x + number,
        "*": lambda x: x * number,
        "-": lambda x: x - number,
        "r-": lambda x: number - x,
        "r*": lambda x: number * x,
        "*=": lambda x: x.clone().mul_(number),
        "+=": lambda x: x.clone().add_(number),
        "out": lambda x: torch.mul(x, number, out=torch.empty(0, dtype=torch.complex128)),
    }
    if number:
        calls["/"] = lambda x: x / number
    for dtype in (*FLOATS, torch.float64, torch.int64, torch.int8, torch.bool):
        for label, call in calls.items():
            x = _values(shape, dtype)
            torchs = _outcome(call, x)
            with overridden():
                ours = _outcome(call, x)
            if not isinstance(torchs, torch.Tensor) or not isinstance(ours, torch.Tensor):
                assert not isinstance(ours, torch.Tensor), (label, dtype, ours, torchs)
                assert not isinstance(torchs, torch.Tensor), (label, dtype, ours, torchs)
            elif torchs.dtype.is_complex:
                assert ours.dtype == torchs.dtype
                torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)
            else:
                assert ours.dtype == torchs.dtype, (label, dtype)
                assert torch.equal(bits(ours), bits(torchs)), (label, dtype)


def test_overrides_work_registered_or_not() -> None:
    x = _values((3, 70), torch.float32)
    keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for name in ("silu", "abs.out", "glu", "max", "mse_loss_backward"):
        arguments = {
            "silu": (x,),
            "glu": (x,),
            "abs.out": (x,),
            "max": (x,),
            "mse_loss_backward": (torch.tensor(1.0), x, x + 1, 1),
        }[name]
        out = {"out": torch.empty(0)} if name == "abs.out" else {}
        alone = elementwise.overrides()[name](keyset, *arguments, **out)
        with overridden():
            inside = elementwise.overrides()[name](keyset, *arguments, **out)
        assert torch.equal(alone, inside)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_losses_and_their_gradients_are_torchs(reduction: str) -> None:
    functional = torch.nn.functional
    losses = (
        functional.mse_loss,
        functional.huber_loss,
        functional.smooth_l1_loss,
        functional.binary_cross_entropy,
    )
    for loss in losses:
        results = []
        for context in (None, overridden()):
            x = torch.linspace(0.05, 0.95, 70).requires_grad_()
            target = torch.linspace(0.9, 0.1, 70)
            with torch.enable_grad():
                if context is None:
                    loss(x, target, reduction=reduction).sum().backward()
                else:
                    with context:
                        loss(x, target, reduction=reduction).sum().backward()
            results.append(x.grad)
        torch.testing.assert_close(results[1], results[0])


def test_glu_and_its_gradient_are_torchs() -> None:
    for shape, dim in (((3, 10), -1), ((6, 5), 0), ((2, 4, 7), 1)):
        gradients = []
        for inside in (False, True):
            x = _values(shape, torch.float32).requires_grad_()
            with torch.enable_grad():
                if inside:
                    with overridden():
                        torch.nn.functional.glu(x, dim).square().sum().backward()
                else:
                    torch.nn.functional.glu(x, dim).square().sum().backward()
            gradients.append(x.grad)
        torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ["amax", "amin"])
def test_a_tie_of_zeros_is_positive(name: str) -> None:
    x = torch.tensor([0.0, -0.0]).repeat(50)
    for row in (x, x.flip(0), torch.stack([x, x], -1)[:, 0]):
        with overridden():
            assert not torch.signbit(getattr(row, name)(-1))
            assert not torch.signbit(row.max() if name == "amax" else row.min())


def test_what_depends_on_neighbours_is_refused() -> None:
    # Complex lerp chooses between two formulas for all weights of a vector.
    z = torch.ones(4, dtype=torch.complex64)
    with overridden(), pytest.raises(UncoveredOpError, match="lerp"):
        torch.lerp(z, z, z)


def test_index_add_with_alpha_does_not_depend_on_the_width() -> None:
    g = torch.Generator().manual_seed(0)
    self, source = torch.randn(9, 100, generator=g), torch.randn(50, 100, generator=g)
    self, source = self.bfloat16(), source.bfloat16()
    index = torch.randint(0, 9, (50,), generator=g)
    with overridden():
        whole = self.index_add(0, index, source, alpha=1.7)
        for k in (1, 3, 33, 65):
            part = self[:, :k].contiguous().index_add(0, index, source[:, :k], alpha=1.7)
            assert torch.equal(bits(part), bits(whole[:, :k]))


def test_what_fits_goes_straight_to_torchs_kernel() -> None:
    x = _values((4, 64), torch.float32)
    torch.set_num_threads(1)
    assert torch.equal(bits(body_of("silu")(x)), bits(stock("silu")(x)))
    assert tail_blocks(x.numel(), 1, (32768, 32768)) is None
