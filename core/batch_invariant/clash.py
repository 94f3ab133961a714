"""Overrides of other libraries, which would decide the bits: found before the mode's, and after.

Of two overrides torch lets the later one win, with a warning. It keeps a record of them by key. The
mode's own are taken out of that record while they are in place, so that what appears there is
somebody else's. A torch that refuses a second override (`allow_override` is False by default) keeps
its record, with the device's own spelling of the key added.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch

from batch_invariant.errors import OverrideClash
from batch_invariant.ops import CONTRACTS
from batch_invariant.ops.register import NAMESPACE

_default = inspect.signature(torch.library.Library.impl).parameters.get("allow_override")
_LATER_WINS = _default is not None and _default.default is True

_watched: set[str] = set()
_size = 0
_mine: set[str] = set()
_kernels: dict[str, tuple[str, ...]] = {}
"""What the dispatcher has for operators of the mode and the library: an override that says
`allow_override` leaves no trace in torch's record, but it does there."""


def record() -> set[str]:
    """Torch's record of overrides, as namespace/operator/key."""
    found: set[str] = torch.library._impls
    return found


def refuse_earlier(name: str, key: str) -> None:
    """Raises if somebody else has overridden an aten operator at this key already."""
    if _spelled("aten", name, key) & record():
        raise OverrideClash(
            f"aten::{name} is already overridden at {key} by another library, which would "
            "decide the bits; import batch_invariant without it, or turn its mode off first"
        )


def watch(library: torch.library.Library, before: Collection[str]) -> None:
    """From now on `check` finds whoever overrides what this library does.

    before: the record as it was before the library. A vendor may have written its operators in
    Python: those are in it, and are not watched.
    """
    global _size
    mine = library._op_impls - set(before)
    _mine.update(mine)
    names = {n for key in mine for n in _spelled(*key.split("/"))}
    if _LATER_WINS:
        library._op_impls -= mine
        torch.library._impls -= mine
        _watched.update(names)
    else:
        library._op_impls |= names
        torch.library._impls |= names
    _size = len(record())


def forget() -> None:
    """The mode's overrides are gone."""
    _watched.clear()
    _mine.clear()
    _kernels.clear()


def remember() -> None:
    """All of the mode's overrides are in place: what the dispatcher has now is theirs."""
    for key in _mine:
        namespace, name, _ = key.split("/")
        _kernels[f"{namespace}::{name}"] = _registered(f"{namespace}::{name}")
    for name in CONTRACTS:
        _kernels[f"{NAMESPACE}::{name}"] = _registered(f"{NAMESPACE}::{name}")


def is_replaced(name: str) -> bool:
    """Whether somebody has registered a kernel for an operator after the mode did."""
    return name in _kernels and _registered(name) != _kernels[name]


def _registered(name: str) -> tuple[str, ...]:
    """The kernels of an operator, in use and replaced, at every dispatch key."""
    return tuple(torch._C._dispatch_dump(name).splitlines())


def check() -> None:
    """Raises `OverrideClash` if somebody has overridden an operator after the mode did."""
    global _size
    if not _watched or len(record()) == _size:
        return
    if found := sorted(_watched & record()):
        names = sorted({"::".join(key.split("/")[:2]) for key in found})
        raise OverrideClash(
            f"{', '.join(names)}: overridden by another library while the mode is on, and so it "
            "decides the bits now; turn that library's mode off (vLLM and vllm-ascend: unset "
            "VLLM_BATCH_INVARIANT and call batch_invariant.enable()), or this one by "
            "batch_invariant.disable()"
        )
    _size = len(record())


def watched(name: str, key: str) -> bool:
    """Whether the mode overrides an aten operator here, which torch's record may not show."""
    return f"aten/{name}/{key}" in _watched


def checking(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, after a check."""

    def run(*args: Any, **kwargs: Any) -> Any:
        check()
        return fn(*args, **kwargs)

    return run


def _spelled(namespace: str, name: str, key: str) -> set[str]:
    """How torch may have recorded it: an out-of-tree device has a name of its own."""
    own: str = torch._C._get_privateuse1_backend_name().upper()
    return {f"{namespace}/{name}/{k}" for k in (key, key.replace("PrivateUse1", own))}
