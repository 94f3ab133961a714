"""Every check that applies to the named backend, as a test."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from batch_invariant.proof import checks
from batch_invariant_pytest import PLAN, PROPERTY


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    items = metafunc.config.stash.get(PLAN, None)
    if items is None:
        pytest.exit("batch_invariant.conformance needs --bi-backend=NAME", returncode=4)
    metafunc.parametrize("item", [as_parameter(i) for i in items if i.check != checks.ANY_SIZE])


def as_parameter(item: checks.Item) -> object:
    """The item with its name as id; where the backend declares a gap, a strict xfail."""
    marks = (
        [pytest.mark.xfail(reason=item.gap.reason, strict=True, raises=pytest.fail.Exception)]
        if item.gap
        else []
    )
    return pytest.param(item, id=item.label, marks=marks)


def test_operator(item: checks.Item, record_property: Callable[[str, object], None]) -> None:
    outcome = checks.run(item)
    record_property(PROPERTY, json.dumps(outcome.as_dict()))
    if outcome.breaks:
        pytest.fail("\n".join(map(str, outcome.breaks)), pytrace=False)
