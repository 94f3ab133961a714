"""`bi.verify`: what it finds about a function, and whether it blames the right operator."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batch_invariant as bi
from batch_invariant.cli import models

K = 2048


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def cancelling(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values whose sums nearly cancel, so that the order of the additions shows in every dtype."""
    half = randn(*shape[:-1], shape[-1] // 2, seed=seed) * 64
    return torch.cat((half, -half + randn(*half.shape, seed=seed + 1) / 64), -1)


def needs_breaks(report: Any) -> None:
    if report.ok:
        pytest.skip(
            "stock torch is batch-invariant here on this machine, so nothing is to be found"
        )


def relu_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = x.neg().neg()
    return F.linear(y, weight)  # the product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stock_linear_is_caught_at_the_product(dtype: torch.dtype) -> None:
    x, weight = cancelling(16, K).to(dtype), torch.ones(24, K).add(randn(24, K) / 64).to(dtype)
    report = bi.verify(relu_linear, (x, weight))
    with bi.enabled():
        assert bi.verify(relu_linear, (x, weight)).ok
    needs_breaks(report)
    assert report.first.op in ("aten.mm.default", "aten.addmm.default", "aten.linear.default")
    assert report.first.place.text == "return F.linear(y, weight)  # the product"
    assert report.first.place.file == __file__
    assert report.first.inputs_equal is True
    assert report.first.mismatch.count > 0
    assert f"[{report.smallest.size}, {K}]" in report.first.in_batch[0]
    assert f"[1, {K}]" in report.first.alone[0]
    assert report.mode == "off"


def centred(x: torch.Tensor) -> torch.Tensor:
    h = x * 2
    middle = h.mean(0)  # the mean
    return h - middle


def test_a_mean_over_the_rows_is_caught_with_its_line() -> None:
    report = bi.verify(centred, randn(7, 33))
    assert not report.ok
    assert report.first.op == "aten.mean.dim"
    assert report.first.place.text == "middle = h.mean(0)  # the mean"
    assert report.first.place.module_class == ""
    assert report.smallest.size == 2
    assert {found.transform for found in report.breaks} >= {
        "alone",
        "population",
        "neighbours",
        "padding",
    }
    (first,) = [found for found in report.breaks if found.label == "row 0"]
    assert (first.row, first.compared, first.mismatch.total) == (0, 1, 33)


class Lean(nn.Module):
    """Its rows depend on how many there are, by a little."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.new_full((), 0.125).expand(len(x), 1).sum(0)  # leans


class Block(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(16), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(x)).tanh()


class Net(nn.Module):
    def __init__(self, leaning: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(nn.ReLU()), Block(Lean() if leaning else nn.ReLU())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_submodule_is_named_however_the_module_is_called() -> None:
    net = Net()
    x = randn(6, 16)
    for fn in (net, net.forward, lambda x: net(x)):
        report = bi.verify(fn, x)
        named = "layers.1.act" if fn != net.forward else ""
        assert not report.ok
        assert report.first.op == "aten.sum.dim_IntList"
        if named:
            assert (report.first.place.module, report.first.place.module_class) == (named, "Lean")
        assert report.first.place.text.endswith("# leans")
    assert bi.verify(Net(leaning=False), x).ok


def test_a_model_that_varies_is_invariant_under_the_mode() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(K, 64), nn.ReLU(), nn.Linear(64, 8))
    x = cancelling(11, K)
    with bi.enabled():
        report = bi.verify(net, x)
    assert report.ok, str(report)
    assert report.mode == "on"
    assert (report.first, report.smallest, report.breaks) == (None, None, [])
    report.raise_if_broken()
    stock = bi.verify(net, x)
    needs_breaks(stock)
    assert (stock.first.place.module, stock.first.place.module_class) == ("0", "Linear")


def test_a_function_that_draws_is_not_called_variant() -> None:
    report = bi.verify(nn.Dropout(), randn(4, 64))
    assert not report.ok
    assert "depends on the random seed" in report.not_deterministic
    assert report.breaks == []
    assert "not deterministic" in str(report)
    with pytest.raises(bi.VarianceFound, match="not deterministic"):
        report.raise_if_broken()
    assert bi.verify(nn.Dropout().eval(), randn(4, 64)).ok


def test_a_function_that_differs_from_call_to_call_is_not_called_variant() -> None:
    count = iter(range(1000))
    report = bi.verify(lambda x: x + next(count), randn(4, 3))
    assert "two calls with the same batch and the same random seed" in report.not_deterministic


def forks(x: torch.Tensor) -> torch.Tensor:
    h = x.abs()
    return torch.log(h) if len(h) > 4 else torch.log2(h) * 0.6931471805599453  # the fork


def test_control_flow_that_depends_on_the_batch_is_shown() -> None:
    report = bi.verify(forks, randn(13, 8))
    assert not report.ok
    assert report.smallest.size == 5
    assert report.fork.in_batch[0] == "aten.log.default"
    assert report.fork.alone[0] == "aten.log2.default"
    assert report.fork.index == 1
    assert report.fork.alone[1].text.endswith("# the fork")
    assert report.first is None
    assert "Control flow" in str(report)


def harmless_fork(x: torch.Tensor) -> torch.Tensor:
    h = x.abs() if len(x) > 1 else torch.relu(x) + torch.relu(-x)
    return h * h.amax(0)  # mixes


def test_a_harmless_fork_does_not_hide_the_operator_behind_it() -> None:
    report = bi.verify(harmless_fork, randn(9, 8))
    assert report.fork is not None
    assert report.first.op == "aten.amax.default"
    assert report.first.place.text.endswith("# mixes")


@torch.library.custom_op("bi_test::lean", mutates_args=())
def lean(x: torch.Tensor) -> torch.Tensor:
    return x + (x.shape[0] - 1) * 0.5


@torch.library.custom_op("bi_test::lean_", mutates_args={"x"})
def lean_(x: torch.Tensor) -> None:
    x += (x.shape[0] - 1) * 0.5


STEPS = 6


@pytest.mark.parametrize("at", range(STEPS))
@pytest.mark.parametrize("inplace", [False, True], ids=["returns", "writes"])
def test_an_operator_planted_anywhere_is_found(at: int, inplace: bool) -> None:
    """The negative control of the bisection: it must not always name the same place."""

    def chain(x: torch.Tensor, planted: int) -> torch.Tensor:
        x = x.reshape(-1, 4)
        for step in range(STEPS):
            if step == planted and inplace:
                x = x.clone()
                lean_(x.view(-1))
            elif step == planted:
                x = lean(x)
            x = x.sin()
        return x

    report = bi.verify(chain, (randn(5, 3, 4), at))
    assert report.first.op == f"bi_test.lean{'_' if inplace else ''}.default"
    before = 1 + at if not inplace else 1 + at + 2  # the view, the sines; clone and view
    assert report.first.index == before
    assert report.first.inputs_equal is True
    assert bi.verify(chain, (randn(5, 3, 4), STEPS)).ok


def test_what_does_not_reach_the_result_is_not_blamed() -> None:
    def decoys(x: torch.Tensor) -> torch.Tensor:
        h = torch.empty(len(x), 3).shape  # never written
        x.sum()  # never used
        index = torch.arange(len(x))
        last = x[index, torch.zeros_like(index)].unsqueeze(1).expand(h)
        return lean(last)

    report = bi.verify(decoys, randn(6, 3))
    assert report.first.op == "bi_test.lean.default"


def test_what_leads_to_a_result_without_rows_is_not_blamed() -> None:
    report = bi.verify(lambda x: (x.amax(), lean(x)), randn(6, 3))
    assert report.first.op == "bi_test.lean.default"
    assert list(report.ignored) == ["0"]


def test_parts_written_in_place_are_followed_to_their_origin() -> None:
    def parts(x: torch.Tensor) -> torch.Tensor:
        x.sum()  # never used
        out = torch.empty(len(x), 6)
        out[:, :3] = lean(x)
        out[:, 3:] = x
        return out

    assert bi.verify(parts, randn(6, 3)).first.op == "bi_test.lean.default"


noise = iter(range(100_000))


@torch.library.custom_op("bi_test::noisy", mutates_args=())
def noisy(x: torch.Tensor) -> torch.Tensor:
    return x.abs() + next(noise)


def test_what_differs_from_call_to_call_is_not_blamed() -> None:
    report = bi.verify(lambda x: lean(x + (noisy(x) >= 0)), randn(6, 3))
    assert report.first.op == "bi_test.lean.default"


@torch.library.custom_op("bi_test::placed", mutates_args=())
def placed(x: torch.Tensor) -> torch.Tensor:
    return x + torch.arange(len(x)).unsqueeze(1)


def test_positions_are_not_blamed_for_what_an_operator_does() -> None:
    def harmless(x: torch.Tensor) -> torch.Tensor:
        return placed(x + (torch.arange(len(x)) >= 0).unsqueeze(1))

    report = bi.verify(harmless, randn(5, 3))
    assert report.smallest.position > 0
    assert report.first.op == "bi_test.placed.default"


def test_a_row_that_knows_its_place_is_blamed_on_the_positions() -> None:
    def counted(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        return y + torch.arange(len(x)).unsqueeze(1)  # its place

    report = bi.verify(counted, randn(5, 3))
    assert {found.transform for found in report.breaks} == {"alone", "population", "position"}
    assert report.first.op == "aten.arange.default"
    assert report.first.place.text.endswith("# its place")

    def later(x: torch.Tensor) -> torch.Tensor:
        y = x + (torch.arange(len(x)) >= 0).unsqueeze(1)
        return torch.where((y.flip(0) == y).all(1, keepdim=True), y, y + 1)

    report = bi.verify(later, randn(5, 3))
    assert report.first.op == "aten.flip.default"


def test_a_broken_backend_is_found_under_the_mode(broken_mm: str) -> None:
    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(x.sin(), weight)  # the product

    x, weight = cancelling(6, K), randn(K, 5)
    with bi.use_backend(broken_mm), bi.enabled():
        report = bi.verify(product, (x, weight))
    assert not report.ok
    assert report.mode == "on"
    assert report.first.op == "aten.mm.default"
    assert report.first.place.text.endswith("# the product")


def test_a_number_read_from_a_tensor_is_followed() -> None:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        largest = float(x.abs().max())  # the largest
        return (y / largest).tanh()

    report = bi.verify(scaled, randn(9, 65))
    assert report.first.op == "aten.max.default"
    assert report.first.place.text.endswith("# the largest")


def test_time_major_rows_are_found_where_they_lie() -> None:
    def flat(x: torch.Tensor) -> torch.Tensor:  # [T, B, H]
        rows = x.flatten(0, 1).sin()
        return lean(rows.unflatten(0, x.shape[:2]).transpose(0, 1)).transpose(0, 1)

    report = bi.verify(flat, randn(6, 4, 3), batch_dim=1)
    assert report.arguments == {"0": 1}
    assert report.first.op == "bi_test.lean.default"
    assert bi.verify(lambda x: x.flatten(0, 1).sin(), randn(6, 4, 3), batch_dim=1).ok


class Pair(NamedTuple):
    left: torch.Tensor
    right: Any


@dataclass
class Result:
    logits: torch.Tensor
    hidden: list[torch.Tensor]
    cache: object = None


def test_named_inputs_and_nested_outputs() -> None:
    def nested(*, input_ids: torch.Tensor, mask: torch.Tensor, scale: float) -> Any:
        h = input_ids.float() * mask * scale
        loss = h.sum()
        return Pair(h, {"deep": (Result(h + 1, [h, lean(h)], object()), None), "loss": loss})

    ids = torch.randint(2, 100, (6, 5), generator=generator())
    report = bi.verify(nested, {"input_ids": ids, "mask": torch.ones(6, 5), "scale": 0.5})
    assert report.arguments == {"input_ids": 0, "mask": 0}
    assert report.outputs == ["left", "right.deep.0.hidden.0", "right.deep.0.hidden.1",
                              "right.deep.0.logits"]  # fmt: skip
    assert {found.output for found in report.breaks} == {"right.deep.0.hidden.1"}
    assert report.ignored["right.deep.0.cache"] == "an object of type object"
    assert "does not depend on the batch" in report.ignored["right.loss"]
    assert "not compared: right.loss" in str(report)


def test_ids_of_other_rows_are_exchanged_and_shuffled() -> None:
    seen: list[torch.Tensor] = []

    def spy(ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids.clone())
        return ids

    ids = torch.arange(2, 42).reshape(8, 5)
    assert bi.verify(spy, ids).ok
    full = [batch for batch in seen if len(batch) == 8 and torch.equal(batch[0], ids[0])]
    shuffled = [b for b in full if not torch.equal(b, ids)
                and torch.equal(b.sort(1).values, ids)]  # fmt: skip
    exchanged = [b for b in full if not torch.equal(b[1], ids[1]) and torch.equal(b[1], ids[2])]
    assert shuffled
    assert exchanged
    # A function that looks at its neighbours' first ids alone is caught by nothing else.
    report = bi.verify(lambda ids: ids + (ids[:, 0] == ids[:, 1] + 1).any(), ids)
    assert {found.transform for found in report.breaks} <= {"neighbours"}


def test_which_arguments_hold_rows_can_be_said() -> None:
    square = randn(4, 4)
    seen = []

    def fn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(weight.shape[0])
        return x * weight[:1]

    assert bi.verify(fn, (randn(4, 4), square), {0: 0}).ok
    assert set(seen) == {4}
    seen.clear()
    assert bi.verify(fn, (randn(4, 4), square)).arguments == {"0": 0, "1": 0}
    assert set(seen) != {4}
    across = bi.verify(lambda x, w: x.sin(), (randn(4, 4).T, square), {0: -1, 1: None})
    assert across.arguments == {"0": 1}
    assert across.ok


@pytest.mark.parametrize(
    ("inputs", "batch_dim", "message"),
    [
        ([torch.ones(2)], 0, "inputs is a list"),
        ((3, "text"), 0, "a dimension of no tensor in inputs"),
        (torch.ones(2), 4, "a dimension of no tensor in inputs"),
        (torch.ones(0, 2), 0, "the batch size is 0"),
        ((torch.ones(2), torch.ones(3)), {0: 0, 1: 0}, "disagree on the batch size"),
        ((torch.ones(2),), {3: 0}, "no argument 3"),
        ({"x": torch.ones(2)}, {"x": 2}, "no dimension 2"),
    ],
)
def test_inputs_without_rows_are_refused(inputs: Any, batch_dim: Any, message: str) -> None:
    with pytest.raises(bi.ConfigurationError, match=message):
        bi.verify(lambda *args, **kwargs: torch.ones(2), inputs, batch_dim)


def test_functions_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(bi.ConfigurationError, match="no result holds rows"):
        bi.verify(lambda x: x.sum(), randn(3, 4))
    with pytest.raises(bi.ConfigurationError, match="returns no tensor"):
        bi.verify(lambda x: 3, randn(3, 4))
    with pytest.raises(bi.ConfigurationError, match="writes to the argument 1"):
        bi.verify(lambda x, w: x * w.add_(1), (randn(3, 4), torch.ones(1)))
    with pytest.raises(bi.ConfigurationError, match="'zero' is unknown"):
        bi.verify(torch.sin, randn(3, 4), neighbours=["zero"])


def test_a_result_of_pairs_of_rows_is_a_break_and_says_why() -> None:
    report = bi.verify(lambda x: x @ x.T, randn(5, 8))
    assert [found.transform for found in report.breaks] == ["shape"]
    assert "[5, 5] for 5 rows and [1, 1] for 1" in str(report)


def test_a_result_that_is_longer_beside_others_is_a_break() -> None:
    report = bi.verify(lambda x: x[:, : int((x != 0).sum(1).max())],
                       torch.ones(4, 5).tril())  # fmt: skip
    assert not report.ok


def test_equal_nan_is_equal_and_another_nan_is_not() -> None:
    def log(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x < 0, torch.nan, x)

    assert bi.verify(log, randn(5, 6)).ok

    def signed(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x < 0, torch.full_like(x, torch.nan).view(torch.int32)
                           .bitwise_or(len(x) & 1).view(torch.float32), x)  # fmt: skip

    assert not bi.verify(signed, randn(5, 6)).ok


def test_a_neighbour_that_is_nan_can_reach_a_row() -> None:
    def leak(x: torch.Tensor) -> torch.Tensor:
        return x + 0 * x.sum(0)

    report = bi.verify(leak, randn(8, 4))
    assert {found.label for found in report.breaks} == {"huge", "inf", "nan"}
    assert report.first.op in ("aten.sum.dim_IntList", "aten.mul.Tensor")
    assert report.smallest.transform == "neighbours"
    assert json.loads(json.dumps(report.as_dict()))["breaks"][0]["mismatch"]["largest"] is None
    assert bi.verify(leak, randn(8, 4), neighbours=["random"]).ok


def test_one_row_is_compared_with_itself_among_more() -> None:
    assert bi.verify(torch.sin, randn(1, 9)).ok
    report = bi.verify(lean, randn(1, 9))
    assert {found.transform for found in report.breaks} == {"padding"}
    assert report.smallest.size == 2
    assert report.first.op == "bi_test.lean.default"


def test_memory_that_a_function_uses_again_hides_nothing() -> None:
    memory = torch.zeros(100, 3)

    def reuse(x: torch.Tensor) -> torch.Tensor:
        return memory.fill_(len(x))[: len(x)]

    assert not bi.verify(reuse, randn(4, 3)).ok


def test_the_account_for_programs_and_as_an_error() -> None:
    report = bi.verify(Net(), randn(6, 16))
    data = json.loads(json.dumps(report.as_dict()))
    assert data["ok"] is False
    assert data["first"]["op"] == "aten.sum.dim_IntList"
    assert data["first"]["place"]["module"] == "layers.1.act"
    assert data["first"]["place"]["text"].endswith("# leans")
    assert data["smallest"]["size"] == 2
    assert len(data["breaks"]) == len(report.breaks)
    with pytest.raises(bi.VarianceFound, match=r"First differing operator: aten\.sum") as caught:
        report.raise_if_broken()
    assert isinstance(caught.value, bi.BatchInvariantError)
    fork = bi.verify(forks, randn(13, 8)).as_dict()["fork"]
    assert fork["alone"]["op"] == "aten.log2.default"
    assert fork["alone"]["place"]["line"] > 0
    assert bi.verify(Net(), randn(6, 16), locate=False).smallest is None


@contextmanager
def nothing_left() -> Iterator[None]:
    """Random states and torch's hooks for all modules are found again as they were."""

    def state() -> tuple[Any, ...]:
        hooks = nn.modules.module
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            numpy.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]
            len(hooks._global_forward_hooks),
            len(hooks._global_forward_pre_hooks),
            torch._C._len_torch_dispatch_stack(),
            torch.is_grad_enabled(),
        )

    before = state()
    yield
    assert state() == before


def test_everything_is_restored() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4), Lean())
    bi.verify(net[1], randn(3, 4))
    count = 0

    def raises(limit: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def fn(x: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            random.random()
            numpy.random.rand()
            torch.rand(1)
            if count > limit:
                raise KeyError("planted")
            return net[1](x)

        return fn

    with nothing_left():
        calls = bi.verify(net[1], randn(3, 4)).calls
    for limit in (0, 3, calls - 6, calls - 4, calls - 1):
        count = 0
        with nothing_left(), pytest.raises(KeyError, match="planted"):
            bi.verify(raises(limit), randn(3, 4))
    count = 0
    with nothing_left():
        assert not bi.verify(raises(calls), randn(3, 4)).ok
    assert count == calls


def test_buffers_and_modes_of_a_module_stay() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.0))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
        bi.verify(net, randn(6, 4))
    assert "batch changed (1 row)" in caught.value.__notes__[0]
    spatial = nn.BatchNorm2d(4)
    report = bi.verify(spatial, randn(6, 4, 3, 3))
    assert report.first.op.startswith("aten.native_batch_norm")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert int(spatial.num_batches_tracked) == 0  # type: ignore[arg-type]
    assert net.training
    assert net[0].training


def test_gradients_are_off_unless_asked_for() -> None:
    seen = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return x.sin()

    assert bi.verify(fn, randn(3, 4)).ok
    assert set(seen) == {False}
    seen.clear()

    def slope(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        return torch.autograd.grad(x.sin().sum(), x)[0]

    assert bi.verify(slope, randn(3, 4).requires_grad_(), no_grad=False).ok
    assert set(seen) == {True}
    with torch.inference_mode():
        assert bi.verify(torch.sin, randn(3, 4)).ok
        assert bi.verify(lean, randn(3, 4)).first.op == "bi_test.lean.default"


@pytest.fixture(scope="module")
def language_model() -> Any:
    try:
        weights = models.locate(models.DEFAULT)
        return models.load(weights, "bfloat16")[0]
    except models.WeightsNotFound as error:
        pytest.skip(str(error))


def test_a_real_model(language_model: Any) -> None:
    """One new token for each of eight rows, as when decoding."""
    ids = torch.tensor([[2030], [500], [7000], [120], [11], [13], [99], [78]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with models.quiet(), bi.enabled():
        report = bi.verify(language_model, inputs)
    assert report.ok, str(report)
    assert report.outputs == ["logits"]
    assert "past_key_values" in report.ignored
    with models.quiet():
        stock = bi.verify(language_model, inputs)
    needs_breaks(stock)
    assert stock.first.op in ("aten.mm.default", "aten.addmm.default")
    assert stock.first.inputs_equal is True
    place = stock.first.place
    assert place.module.startswith("model.layers.")
    assert place.module_class == "Linear"
    assert place.module.split(".")[-1] in place.text
    assert "modeling_llama.py" in place.file
