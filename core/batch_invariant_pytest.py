"""The pytest plugin of batch-invariant: options of the conformance suite, and its certificate.

    pytest --pyargs batch_invariant.conformance --bi-backend=NAME

Loaded by every pytest where batch-invariant is installed, so it imports nothing but pytest until
one of its options is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PLAN: pytest.StashKey[list[Any]] = pytest.StashKey()
"""The checks to be run, for the suite."""

COLLECTED: pytest.StashKey[bool] = pytest.StashKey()
"""Set where the suite is among what is collected."""

NOTHING = "nothing to search"
"""The id of the search for counterexamples where no operator of the plan has sizes."""

PROPERTY = "batch_invariant_outcome"
"""The name under which a test hands its outcome on, also from the workers of pytest-xdist."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("batch-invariant", "conformance of a batch-invariant backend")
    group.addoption(
        "--bi-backend", metavar="NAME", help="the backend that batch_invariant.conformance checks"
    )
    group.addoption(
        "--bi-op",
        action="append",
        default=[],
        metavar="NAME",
        help="check only this operator (repeatable)",
    )
    group.addoption(
        "--bi-level",
        choices=("run_to_run", "batch", "schedule", "parallel"),
        help="check up to this guarantee, and require it, instead of what each kernel declares",
    )
    group.addoption(
        "--bi-report", metavar="PATH", help="write the certificate, as JSON, to this file"
    )


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--bi-backend")
    if name is None:
        for option in ("--bi-op", "--bi-level", "--bi-report"):
            if config.getoption(option):
                raise pytest.UsageError(f"{option} needs --bi-backend=NAME")
        return
    from batch_invariant.errors import BatchInvariantError
    from batch_invariant.guarantee import Guarantee
    from batch_invariant.proof import checks

    level = config.getoption("--bi-level")
    report = config.getoption("--bi-report")
    if report and not Path(report).absolute().parent.is_dir():
        raise pytest.UsageError(f"--bi-report={report}: there is no such folder")
    try:
        # A backend that cannot run is an error: a suite that skips everything would pass.
        config.stash[PLAN] = checks.plan(
            name,
            config.getoption("--bi-op"),
            Guarantee[level.upper()] if level else None,
            search=True,
        )
    except BatchInvariantError as error:
        raise pytest.UsageError(str(error)) from error
    if report:
        planned = len(config.stash[PLAN])
        if not config.getoption("collectonly"):
            config.pluginmanager.register(_Report(name, Path(report), planned, level))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if COLLECTED in config.stash and PLAN not in config.stash:
        raise pytest.UsageError("batch_invariant.conformance needs --bi-backend=NAME")
    # Where nothing is to be searched, neither a skip nor a test that passes should say otherwise.
    empty = [item for item in items if item.name == f"test_any_size[{NOTHING}]"]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if item not in empty]


class _Report:
    """Gathers what the tests found, and writes the certificate when they are over."""

    def __init__(self, backend: str, path: Path, planned: int, level: str | None) -> None:
        self._level = level
        self._backend = backend
        self._path = path
        self._planned = planned
        self._outcomes: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self._outcomes += [
                json.loads(str(value)) for name, value in report.user_properties if name == PROPERTY
            ]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        # A worker of pytest-xdist sees only its own tests; its controller sees all of them.
        if not hasattr(session.config, "workerinput"):
            from batch_invariant.proof import certificate

            # Deselected by -k, stopped by -x or broken off: no certificate of everything.
            scope = "full" if len(self._outcomes) == self._planned else "partial"
            made = certificate.make(self._backend, scope, self._outcomes, self._level)
            self._path.write_text(certificate.text(made))
