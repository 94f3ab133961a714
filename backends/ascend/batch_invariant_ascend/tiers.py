"""Which implementation an operator gets: the first of its tiers that is there and passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib import metadata, util
from typing import Any

import torch

from batch_invariant.errors import OpNotSupported
from batch_invariant_ascend.switches import why_no_level_3


class Tier(Enum):
    """Where a kernel comes from, best first."""

    A = "A: CANN under batch consistency"
    B = "B: AscendC package batch_invariant_ops"
    C = "C: triton-ascend"
    D = "D: composed of elementwise operators"


@dataclass(frozen=True)
class Candidate:
    """One implementation of a part.

    load: the callable; raises `Missing` with what would have to be installed.
    passes: why it is not batch-invariant on this device, or None. Not asked of compositions, whose
        order of additions is written down; a kernel that fails while it is asked is passed over.
    """

    tier: Tier
    load: Callable[[], Callable[..., Any]]
    passes: Callable[[Callable[..., Any]], str | None] | None = None


@dataclass(frozen=True)
class Choice:
    """The chosen implementation, and why each better one was not taken."""

    tier: Tier
    fn: Callable[..., Any]
    better: tuple[str, ...]

    @property
    def shown(self) -> dict[str, Any]:
        """What `bi doctor` shows, as arguments of a `Kernel`."""
        return {"source": self.tier.value, "better": self.better}


class Missing(Exception):
    """A tier is not there; the text says what would have to be installed."""


def choose(part: str, candidates: Sequence[Candidate]) -> Choice:
    """The first candidate that loads and passes; `OpNotSupported` with all reasons if none does."""
    reasons: list[str] = []
    for candidate in candidates:
        letter = candidate.tier.name
        try:
            fn = candidate.load()
            found = candidate.passes(fn) if candidate.passes else None
        except Missing as why:
            reasons.append(f"{letter} {why}")
            continue
        except Exception as error:  # a kernel that does not compile, or refuses what it is given
            first = (str(error).splitlines() or [""])[0]
            reasons.append(
                f"{letter} fails on this device: {part}, {type(error).__name__}: {first}"
            )
            continue
        if found is None:
            return Choice(candidate.tier, fn, tuple(reasons))
        reasons.append(f"{letter} is not batch-invariant on this device: {part}, {found}")
    raise OpNotSupported(f"no tier of the Ascend backend has {part}: {'; '.join(reasons)}")


def need_level_3() -> None:
    """Raises `Missing` where batch consistency cannot be switched on."""
    if (reason := why_no_level_3()) is not None:
        raise Missing(f"needs CANN >= 9.2.0: {reason}")


@cache
def _ascendc_problem() -> str | None:
    if util.find_spec("batch_invariant_ops") is None:
        return "needs the AscendC package batch_invariant_ops (docs/ascend.md)"
    try:
        import batch_invariant_ops  # noqa: F401
    except Exception as error:  # a package of this name may be anybody's
        return f"needs batch_invariant_ops, which does not import: {error}"
    if not hasattr(torch.ops.batch_invariant_ops, "npu_mm_batch_invariant"):
        return (
            "needs AscendC's batch_invariant_ops; another package of that name is installed, "
            "without npu_mm_batch_invariant"
        )
    return None


def ascendc(name: str) -> Any:
    """An operator of the AscendC package; `Missing` where it is not there."""
    if (problem := _ascendc_problem()) is not None:
        raise Missing(problem)
    if not hasattr(torch.ops.batch_invariant_ops, name):
        raise Missing(f"needs {name}, which the installed batch_invariant_ops has not")
    return getattr(torch.ops.batch_invariant_ops, name)


def need_triton() -> None:
    """Raises `Missing` where the installed `triton` is not triton-ascend, or there is none."""
    try:
        metadata.version("triton-ascend")
    except metadata.PackageNotFoundError:
        raise Missing("needs triton-ascend: pip install triton-ascend") from None
    if util.find_spec("triton") is None:
        raise Missing("needs triton-ascend, which is broken: there is no module triton")
