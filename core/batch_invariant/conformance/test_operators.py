"""Every check that applies to the named backend, as a test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest

from batch_invariant.proof import checks
from batch_invariant_pytest import COLLECTED, PLAN, PROPERTY


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    items = metafunc.config.stash.get(PLAN, [])
    metafunc.config.stash[COLLECTED] = True
    metafunc.parametrize("item", [as_parameter(i) for i in items if i.check != checks.ANY_SIZE])


def as_parameter(item: checks.Item) -> object:
    """The item with its name as id."""
    return pytest.param(item, id=item.label)


def conclude(item: checks.Item, breaks: Sequence[object]) -> None:
    """Fails with what is broken. Under a declared gap, a strict xfail: fails if nothing is."""
    if item.gap is not None:
        if breaks:
            pytest.xfail(item.gap.reason)
        pytest.fail(
            f"{item.label} holds, although a gap is declared ({item.gap.reason}); remove the gap",
            pytrace=False,
        )
    if breaks:
        pytest.fail("\n".join(f"{item.label}: {found}" for found in breaks), pytrace=False)


def test_operator(item: checks.Item, record_property: Callable[[str, object], None]) -> None:
    outcome = checks.run(item)
    record_property(PROPERTY, json.dumps(outcome.as_dict()))
    conclude(item, outcome.breaks)
