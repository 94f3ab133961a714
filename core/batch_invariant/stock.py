"""Torch's own kernels, callable whether or not the mode has overridden them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from batch_invariant.errors import BatchInvariantError


def dispatch_key(device_type: str) -> str:
    """The dispatch key of a device type: `cpu` -> `CPU`, an out-of-tree one -> `PrivateUse1`.

    Also that of an out-of-tree device whose torch package is not there, so that its kernels can be
    checked by `to_native`; unless the key is another such device's.
    """
    try:
        return str(torch._C._dispatch_key_for_device(device_type))
    except RuntimeError:
        owner = torch._C._get_privateuse1_backend_name()
        if owner != "privateuseone":
            raise BatchInvariantError(
                f"torch knows no device {device_type!r}, and its one place for out-of-tree devices "
                f"is taken by {owner!r} in this process; use another one for {device_type!r}"
            ) from None
        return "PrivateUse1"


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
