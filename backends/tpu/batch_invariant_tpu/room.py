"""Room for compiled programs in a process that checks kernels.

jax keeps every program that it compiled for a CPU, and each takes some four memory mappings, of
which Linux gives a process 65530. Thousands of shapes in the interpreter come to that.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

MOST = 4000  # programs
_COMPILED = "/jax/core/compile/backend_compile_duration"


class _Count:
    """Programs that jax has compiled since they were last dropped."""

    def __init__(self) -> None:
        self.programs = 0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration: float, **_: Any) -> None:
        self.programs += event == _COMPILED


_count = functools.cache(_Count)


def make_room() -> None:
    """Drops jax's compiled programs once there are too many; those still needed are made anew."""
    if _count().programs >= MOST:
        jax.clear_caches()
        _count().programs = 0
