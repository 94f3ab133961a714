"""What the mode does with aten operators on each device, as compiled code has to know it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import batch_invariant
from batch_invariant.coverage import Refusal, base_of
from batch_invariant.errors import BatchInvariantError


@dataclass(frozen=True, kw_only=True)
class Device:
    """The mode on one device.

    backend: its name and the package it is from; code: the folder of that package, or its one file.
    overloads: every aten overload that runs code of its own here. overridden: those that the mode
    sends elsewhere. refused: those that raise. harmless: what the backend says beside core's own
    table. fused: the `pairs` of operators that it has one kernel for. fault: why nothing can run
    here. Names are without `aten::`.
    """

    backend: str
    code: str
    overloads: frozenset[str]
    overridden: frozenset[str]
    refused: Mapping[str, Refusal]
    harmless: Mapping[str, str | None]
    fused: frozenset[str] = frozenset()
    fault: BatchInvariantError | None = None

    @property
    def elementwise(self) -> bool:
        """Whether any code that computes an elementwise function does so alike at every place."""
        return self.harmless.get("exp") is not None


class Watcher(Protocol):
    """What an audit wants to know of graphs that are compiled while it runs."""

    strict: bool
    """Whether what does not keep the promise raises when it is scheduled."""

    def scheduled(self, kernels: list[Any]) -> None:
        """A graph is made of these `scheduled.Scheduled`."""

    def runs(self, kernels: list[Any]) -> AbstractContextManager[None]:
        """Around each run of a graph that is made of them."""


@dataclass(frozen=True)
class Rules:
    """The mode's setting: by device type, and the operators that may run torch's own kernels.

    eager_bits: elementwise functions are called as in eager, also where the generated ones would
    keep the promise with other bits. enforced: False while the mode is off, when an audit looks on
    and changes nothing.
    """

    devices: Mapping[str, Device]
    allow: frozenset[str]
    eager_bits: bool = False
    enforced: bool = True
    watcher: Watcher | None = None
    identity: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        backends = tuple(
            (device, found.backend, tuple(sorted(found.fused)), str(found.fault))
            for device, found in self.devices.items()
        )
        watched = id(self.watcher) if self.watcher else None
        asked = (tuple(sorted(self.allow)), self.eager_bits)
        identity = (_sources(), backends, asked, self.enforced, watched)
        object.__setattr__(self, "identity", identity)

    def allows(self, name: str) -> bool:
        """Whether an overload, without `aten::`, may run torch's own kernel."""
        return name.split(".")[0] in self.allow or base_of(name) in self.allow


@functools.cache
def _sources() -> str:
    """A digest of what decides how a graph is compiled: other sources, other cached graphs."""
    digest = hashlib.sha256(batch_invariant.__version__.encode())
    core = Path(__file__).parent.parent
    folders = (core / "inductor", core / "ops")
    for path in sorted([core / "coverage.py", *(p for f in folders for p in f.glob("*.py"))]):
        digest.update(path.read_bytes())
    return digest.hexdigest()
