"""Operators of a vendor's own namespaces while the mode is on: replaced, left alone, or refused.

Engines call a vendor's fused kernels by name, past every aten override. A backend names the
namespaces; what it neither replaces nor calls harmless is refused, as an aten operator would be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from batch_invariant import registry, selector
from batch_invariant.errors import BatchInvariantError, UncoveredOpError

_WHY = "the backend neither replaces it nor knows that its own kernel is batch-invariant"


def overrides(
    device_type: str, key: str, fault: BatchInvariantError | None
) -> dict[str, Callable[..., Any]]:
    """What replaces each operator, by qualified name; with `fault` everything raises it."""
    namespaces = _namespaces(device_type)
    if not namespaces:
        return {}
    own: Mapping[str, Callable[..., Any] | None] = {}
    if fault is None:
        own = selector.current_backend(device_type).vendor_overrides()
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    found = {}
    for name in sorted(n for n in names if n.split("::")[0] in namespaces):
        fn = own.get(name, _refuse(name, fault))
        if fn is not None:
            found[name] = fn
    return found


def _namespaces(device_type: str) -> frozenset[str]:
    """Of every installed backend for the device, also of those that cannot run."""
    found: set[str] = set()
    try:
        names = list(registry.installed())
    except BatchInvariantError:  # two packages of one name: every operator says so when called
        return frozenset()
    for name in names:
        try:
            backend = registry.load(name)
        except Exception:  # a plugin for another device may be broken; the selector reports it
            continue
        if backend.device_type == device_type:
            found |= set(backend.vendor_namespaces)
    return frozenset(found)


def _refuse(name: str, fault: BatchInvariantError | None) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if fault is not None:
            raise fault.with_traceback(None)
        shapes = [
            f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}"
            for a in (*args, *kwargs.values())
            if isinstance(a, torch.Tensor)
        ]
        raise UncoveredOpError(name, ", ".join(shapes), _WHY)

    return refuse
