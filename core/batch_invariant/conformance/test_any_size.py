"""Rows keep their bits at any size: a search for counterexamples, shrunk to the smallest one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from batch_invariant.conformance.test_operators import as_parameter, conclude
from batch_invariant.ops.contract import Data, Draw
from batch_invariant.ops.variant import Variant, take
from batch_invariant.proof import checks
from batch_invariant.proof.behaviour import largest_sizes, refusal
from batch_invariant.proof.invariance import compare
from batch_invariant.proof.log import shapes
from batch_invariant.proof.subject import Subject
from batch_invariant_pytest import COLLECTED, NOTHING, PLAN, PROPERTY

EXAMPLES = 15
_ROWS = 24


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.config.stash[COLLECTED] = True
    items = [i for i in metafunc.config.stash.get(PLAN, []) if i.check == checks.ANY_SIZE]
    # The plugin deselects the test of nothing; pytest itself would report it as skipped.
    nothing = pytest.param(None, id=NOTHING)
    metafunc.parametrize("item", [as_parameter(item) for item in items] or [nothing])


def test_any_size(item: checks.Item, record_property: Callable[[str, object], None]) -> None:
    subject = item.subject
    assert subject is not None
    breaks: list[str] = []
    compared: list[int] = []
    try:
        with checks.active(item):
            counterexample(subject, compared)
    except AssertionError as error:
        breaks.append(str(error))
    except Unsatisfiable:
        breaks.append("the kernel supports none of the sizes that were tried")
    record_property(PROPERTY, json.dumps(checks.record(item, len(compared), breaks)))
    conclude(item, breaks)


def counterexample(subject: Subject, compared: list[int]) -> None:
    """Raises `AssertionError` with the smallest call in which a row's bits depend on others.

    compared: gets the number of rows of every comparison that is made.
    """
    make = subject.op.any_size
    assert make is not None
    largest = largest_sizes(make)
    # Small sizes come first, since a failure is shrunk towards them; large ones are tried as well.
    sizes = st.fixed_dictionaries(
        {n: st.integers(1, most) | st.sampled_from((most, most - 1)) for n, most in largest.items()}
    )

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(sizes=sizes, rows=st.integers(2, _ROWS), data=st.sampled_from(Data), more=st.data())
    def holds(sizes: dict[str, int], rows: int, data: Data, more: Any) -> None:
        first = more.draw(st.integers(0, rows - 1))
        count = more.draw(st.integers(1, rows - first))
        seed = more.draw(st.integers(0, 9))
        case = make(**sizes)
        generator = torch.Generator().manual_seed(seed)
        args = case.args(Draw(subject.dtype, data, generator), rows)
        axes = case.batch_axes or subject.op.batch_axes
        chosen = range(first, first + count)
        variant = Variant("any size", "", take(args, axes, chosen), chosen, range(count))
        found: str | None
        # The check "kernel" knows that this is true, and the contract's own cases take no refusal.
        assume(refusal(subject, args) is None and refusal(subject, variant.args) is None)
        try:
            found = compare(
                subject.run(args),
                subject.run(variant.args),
                case.out_axes or subject.op.out_axes,
                variant,
            )
        except Exception as error:  # whatever a kernel raises is what the search found
            found = f"raised {type(error).__name__}: {error}"
        compared.append(count)
        assert found is None, (
            f"rows {first} to {first + count} of {rows}, {data} data, seed {seed}, {shapes(args)} "
            f"({', '.join(f'{name} {size}' for name, size in sizes.items())}): {found}"
        )

    holds()
