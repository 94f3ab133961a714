"""The checks of a backend by name, and the plan of which ones apply to what.

The conformance suite and `bi verify` run the same ones. A check that does not apply is not planned
at all, so nothing is skipped in silence: the plan is part of the certificate.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from batch_invariant import registry, selector
from batch_invariant.backend import Availability, Backend, Gap, Kernel
from batch_invariant.errors import BackendUnavailable, ConfigurationError, InvalidBackend
from batch_invariant.guarantee import Guarantee
from batch_invariant.ops import CONTRACTS
from batch_invariant.proof import behaviour, torch_tools
from batch_invariant.proof.accuracy import accuracy
from batch_invariant.proof.golden import golden
from batch_invariant.proof.gradients import gradients, has_gradient
from batch_invariant.proof.invariance import invariance
from batch_invariant.proof.log import Break, Log
from batch_invariant.proof.restoration import restoration
from batch_invariant.proof.structure import can_be_seen, structure
from batch_invariant.proof.subject import Subject, short
from batch_invariant.proof.transforms import LEVELS

_Run = Callable[[Subject, Log], None]
_Applies = Callable[[Subject], bool]


def _stands(transform: str) -> tuple[_Run, _Applies]:
    return (
        functools.partial(invariance, transform=transform),
        lambda subject: LEVELS[transform] <= subject.level and transform in subject.transforms(),
    )


CHECKS: dict[str, tuple[_Run, _Applies]] = {
    "result": (behaviour.result, lambda s: True),
    "repeat": (behaviour.repeat, lambda s: True),
    **{name: _stands(name) for name in LEVELS},
    "accuracy": (accuracy, lambda s: s.contracted),
    "golden": (golden, lambda s: s.kernel is not None and s.dtype in s.kernel.portable),
    "order": (structure, can_be_seen),
    "bad input": (behaviour.bad_input, lambda s: s.contracted and behaviour.has_wrong_calls(s)),
    "gradients": (gradients, lambda s: s.thorough and has_gradient(s)),
    "dispatch": (torch_tools.dispatch, lambda s: s.on_torch),
    "opcheck": (torch_tools.opcheck, lambda s: s.thorough),
    "compile": (torch_tools.compiled, lambda s: s.thorough),
    "graph replay": (torch_tools.graph_replay, lambda s: s.backend.device_type == "cuda"),
}
"""By name, what runs and for which subjects with a kernel. "kernel" comes first for every one."""

ANY_SIZE = "any size"
"""Searched by the conformance suite alone, which has hypothesis."""

NAMES = ("kernel", *CHECKS, ANY_SIZE, "restoration")


@dataclass(frozen=True)
class Item:
    """One check to be run: of one subject, or of the backend as a whole (`subject` is None)."""

    backend: str
    check: str
    subject: Subject | None
    gap: Gap | None

    @property
    def label(self) -> str:
        return f"{self.subject.label} {self.check}" if self.subject else self.check


@dataclass(frozen=True)
class Outcome:
    """What one check found.

    looked_at: comparisons made. figures: measured values, such as the error in ulps.
    """

    item: Item
    looked_at: int
    breaks: list[Break]
    figures: dict[str, Any]
    seconds: float

    @property
    def ok(self) -> bool:
        """Nothing is broken; or, where the backend declares a gap, something is."""
        return bool(self.breaks) == (self.item.gap is not None)

    def as_dict(self) -> dict[str, Any]:
        """As a certificate is made of: JSON values only."""
        return record(self.item, self.looked_at, self.breaks, self.figures)

    def __str__(self) -> str:
        if self.breaks:
            return "\n".join(f"{self.item.label}: {found}" for found in self.breaks)
        if self.item.gap is not None:
            return f"{self.item.label}: holds, although a gap is declared: {self.item.gap.reason}"
        return f"{self.item.label}: holds"


def plan(
    backend: str,
    ops: Iterable[str] = (),
    level: Guarantee | None = None,
    full: bool = True,
    search: bool = False,
) -> list[Item]:
    """Every check that applies to a backend, in order.

    ops: only these operators. level: check up to this guarantee instead of the declared ones.
    full: all cases and data. search: `ANY_SIZE` too, which `run` does not know.
    Raises `UnknownBackend`, `InvalidBackend`, `BackendUnavailable` or `ConfigurationError`.
    """
    wanted = list(ops) or list(CONTRACTS)
    if unknown := sorted(set(wanted) - set(CONTRACTS)):
        raise ConfigurationError(
            f"unknown operator {', '.join(unknown)}; known: {', '.join(CONTRACTS)}"
        )
    chosen = registry.load(backend)
    available = _asked(chosen, "probe", Availability)
    if not available.ok:
        raise BackendUnavailable(backend, available.reason, available.remedy)
    table = _asked(chosen, "kernels", Mapping)
    gaps = tuple(_asked(chosen, "gaps", Sequence))
    for answers, kind in ((table.values(), Kernel), (gaps, Gap)):
        if strange := [answer for answer in answers if not isinstance(answer, kind)]:
            raise InvalidBackend(
                f"the backend {backend!r} ({registry.distribution(backend)}) returned "
                f"{strange[0]!r}; expected a {kind.__name__}"
            )
    _known(gaps, table, backend)
    items = []
    for name in wanted:
        op, kernel = CONTRACTS[name], table.get(name)
        # float64 is no contract's business, but what a kernel declares of it is checked too.
        beyond = full and kernel is not None and torch.float64 in kernel.dtypes
        for dtype in (*op.dtypes, *((torch.float64,) if beyond else ())):
            reach = level or (kernel.guarantee if kernel else op.level)
            subject = Subject(chosen, op, dtype, kernel, reach, full)
            checks = ["kernel"]
            if kernel is not None and dtype in kernel.dtypes:
                checks += [check for check, (_, applies) in CHECKS.items() if applies(subject)]
                if search and op.any_size is not None:
                    checks.append(ANY_SIZE)
            items += [Item(backend, c, subject, _gap(gaps, subject, c)) for c in checks]
    if full and not ops:
        items.append(Item(backend, "restoration", None, _gap(gaps, None, "restoration")))
    if full and search and not ops and level is None:
        met = {id(item.gap) for item in items}
        for gap in gaps:
            if id(gap) not in met:
                raise ConfigurationError(
                    f"{backend} declares a gap that no check meets: {gap}; remove it"
                )
    return items


def run(item: Item) -> Outcome:
    """Runs one check, with the backend selected; what the kernel raises is a finding."""
    log = Log()
    started = time.perf_counter()
    try:
        if item.subject is None:
            restoration(item.backend, log)
        else:
            check = behaviour.declared if item.check == "kernel" else CHECKS[item.check][0]
            with active(item):
                check(item.subject, log)
    except Exception as error:  # whatever a kernel raises is what the check found
        log.broken(f"raised {type(error).__name__}: {error}")
    if not log.looked_at and not log.breaks:
        log.broken("the check compared nothing")
    return Outcome(item, log.looked_at, log.breaks, log.figures, time.perf_counter() - started)


@contextmanager
def active(item: Item) -> Iterator[None]:
    """The item's backend selected and activated, as it is when its operators are called."""
    assert item.subject is not None
    with selector.use_backend(item.backend):
        selector.kernels(item.subject.backend.device_type)
        yield


def record(
    item: Item, looked_at: int, breaks: Iterable[object], figures: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What was found, as a certificate is made of: JSON values only."""
    subject = item.subject
    return {
        "op": subject.op.name if subject else None,
        "dtype": short(subject.dtype) if subject else None,
        "check": item.check,
        "looked_at": looked_at,
        "gap": item.gap.reason if item.gap else None,
        "breaks": [str(found) for found in breaks],
        "figures": dict(figures or {}),
    }


def _gap(gaps: tuple[Gap, ...], subject: Subject | None, check: str) -> Gap | None:
    for gap in gaps:
        if gap.check not in (None, check):
            continue
        if subject is None:
            if gap.op is None and gap.dtype is None and gap.check is not None:
                return gap
        elif gap.op in (None, subject.op.name) and gap.dtype in (None, subject.dtype):
            return gap
    return None


def _asked(backend: Backend, method: str, kind: type) -> Any:
    """What a method of the backend answers; `InvalidBackend` if it raises or answers otherwise."""
    who = f"{method}() of the backend {backend.name!r} ({registry.distribution(backend.name)})"
    try:
        answer = getattr(backend, method)()
    except Exception as error:  # a plugin may raise anything
        raise InvalidBackend(f"{who} raised {type(error).__name__}: {error}") from error
    if not isinstance(answer, kind):
        raise InvalidBackend(f"{who} returned {answer!r}; expected a {kind.__name__}")
    return answer


def _known(gaps: tuple[Gap, ...], table: Mapping[str, Kernel], backend: str) -> None:
    if strange := sorted(set(table) - set(CONTRACTS)):
        raise ConfigurationError(
            f"{backend} has kernels for operators without a contract: {', '.join(strange)}"
        )
    for gap in gaps:
        if gap.op is not None and gap.op not in CONTRACTS:
            raise ConfigurationError(f"{backend} declares a gap in an unknown operator {gap.op!r}")
        if gap.check is not None and gap.check not in NAMES:
            raise ConfigurationError(
                f"{backend} declares a gap in an unknown check {gap.check!r}; "
                f"known: {', '.join(NAMES)}"
            )
