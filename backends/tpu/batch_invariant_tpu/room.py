"""Room for compiled programs in a process that checks kernels.

jax keeps every program that it compiled for a CPU, and each takes several memory mappings, of which
Linux gives a process 65530. Thousands of shapes in the interpreter come to that.
"""

from __future__ import annotations

import functools
import gc
from pathlib import Path
from typing import Any

import jax

EVERY = 200  # programs, between looks at the mappings
MOST = 20000  # mappings
MAPS = Path("/proc/self/maps")  # Linux's; other systems have no such limit
_COMPILED = "/jax/core/compile/backend_compile_duration"


class _Count:
    """Programs that jax has compiled since the mappings were last counted."""

    def __init__(self) -> None:
        self.programs = 0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration: float, **_: Any) -> None:
        self.programs += event == _COMPILED


_count = functools.cache(_Count)


def mappings() -> int:
    """How many memory mappings this process has; 0 where that is unknown."""
    return MAPS.read_bytes().count(b"\n") if MAPS.exists() else 0


def make_room() -> None:
    """Drops jax's compiled programs if there are too many; those still needed are made anew."""
    if _count().programs >= EVERY:
        _count().programs = 0
        if mappings() > MOST:
            jax.clear_caches()
            gc.collect()
