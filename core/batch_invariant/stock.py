"""Torch's own kernels, callable whether or not the mode has overridden them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch


def dispatch_key(device_type: str) -> str:
    """The dispatch key of a device type: `cpu` -> `CPU`, an out-of-tree one -> `PrivateUse1`."""
    return str(torch._C._dispatch_key_for_device(device_type))


def stock(overload: str, key: str = "CPU") -> Callable[..., Any]:
    """The kernel that torch registers for `aten::<overload>` under a dispatch key.

    The mode captures every kernel before it overrides it, so that a first call made while the
    mode is on finds torch's kernel too.
    """
    return _captured(overload, key)


@functools.cache
def _captured(overload: str, key: str) -> Callable[..., Any]:
    kernel = torch.library.get_kernel(f"aten::{overload}", key)
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return functools.partial(kernel.call_boxed, keyset)


def capture(overloads: Iterable[str], key: str) -> None:
    """Remembers torch's kernels while they are still in place."""
    for overload in overloads:
        _captured(overload, key)
