"""Counters for programs that wait for one another's chunks: zero before and after every launch.

A launch that runs eagerly uses the counters of its stream, whose launches run one after another.
A launch that is captured into a CUDA graph gets counters of its own, since graphs may be replayed
beside each other and beside eager calls.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_EAGER = 1 << 14
_CAPTURED = 1 << 20
_lock = threading.Lock()
_of_stream: dict[tuple[int, int], torch.Tensor] = {}
_reserve: dict[int, tuple[torch.Tensor, int]] = {}


def counters(size: int, device: torch.device, stream: int) -> torch.Tensor:
    """At least `size` int32 zeros for one launch on that stream."""
    found = _of_stream.get((device.index, stream))
    if torch.cuda.is_current_stream_capturing():
        return _captured(size, device)
    if found is None or found.numel() < size:
        with _lock:
            # A smaller one may be in use by launches under way: it is kept, not freed.
            found = _lasting(max(size, _EAGER), device)
            _kept.append(found)
            _of_stream[device.index, stream] = found
            if device.index not in _reserve:
                _reserve[device.index] = (_lasting(_CAPTURED, device), 0)
    return found


def _lasting(size: int, device: torch.device) -> torch.Tensor:
    """Zeros that any stream may use, outside of the memory pool of the calling thread.

    While CUDA graph trees warm up, a thread allocates from the pool of its graph, where nothing
    may stay; that holds for this thread alone.
    """

    def zeros() -> torch.Tensor:
        made = torch.zeros(size, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()
        return made

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(zeros).result()


_kept: list[torch.Tensor] = []


def _captured(size: int, device: torch.device) -> torch.Tensor:
    with _lock:
        reserve, used = _reserve.get(device.index, (None, 0))
        if reserve is not None and used + size <= reserve.numel():
            _reserve[device.index] = (reserve, used + size)
            return reserve[used : used + size]
    # Nothing is left: zeros that the graph itself writes at every replay.
    return torch.zeros(size, dtype=torch.int32, device=device)
