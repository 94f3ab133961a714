"""Which backend's kernels the operators run, for each device type.

Precedence: `use_backend(name)`, then `BATCH_INVARIANT_BACKEND`, then the installed and available
backend of the tensor's device type. The chosen kernels are registered under the device's dispatch
key, so a call costs one dispatch. A request by name never falls back.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NoReturn

import torch

from batch_invariant import env, registry
from batch_invariant.backend import Availability, Backend, Kernel
from batch_invariant.errors import BackendUnavailable, BatchInvariantError, OpNotSupported
from batch_invariant.ops import CONTRACTS
from batch_invariant.ops.register import NAMESPACE
from batch_invariant.stock import dispatch_key

_lock = threading.RLock()
_forced: str | None = None
_live: dict[str, tuple[Backend, Mapping[str, Kernel], torch.library.Library]] = {}
_listeners: list[Callable[[], None]] = []


def backends() -> dict[str, Availability]:
    """Every installed backend, and whether it can run here; a broken plugin is a reason."""
    found = {}
    for name in registry.installed():
        try:
            found[name] = registry.load(name).probe()
        except Exception as error:  # a report shows what is wrong with a plugin, whatever it is
            found[name] = Availability(False, f"{type(error).__name__}: {error}")
    return found


def current_backend(device: str | torch.device = "cpu") -> Backend:
    """The backend whose kernels run for tensors on that device.

    Raises `UnknownBackend`, `BackendUnavailable` or `OpNotSupported` as a call there would.
    """
    return _resolve(torch.device(device).type)[0]


def kernels(device_type: str) -> Mapping[str, Kernel]:
    """The selected kernels for a device type, by operator name."""
    return _resolve(device_type)[1]


class _Selection:
    """What `use_backend` returns: leaving it as a context restores the previous selection."""

    def __init__(self, name: str | None, before: str | None) -> None:
        self._name, self._before = name, before

    def __repr__(self) -> str:
        if self._name is None:
            return "backends are chosen by the tensors' devices"
        known = registry.load(self._name).probe().reason
        return f"backend {self._name!r}" + (f"; {known}" if known else "")

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _select(self._before)


def use_backend(name: str | None) -> _Selection:
    """Selects a backend by name, at once; `None` returns to the automatic choice.

    Also a context manager that restores the previous selection; shown, it tells what the backend
    says of itself, such as on which route its kernels run. Raises `UnknownBackend` if it is
    not installed and `BackendUnavailable`, with the remedy, if it cannot run; nothing changes then.
    """
    with _lock:
        before = _forced
        _select(name)
        return _Selection(name, before)


def release() -> None:
    """Deactivates every backend: its vendor switches are as they were until it is needed again."""
    with _lock:
        _clear()


def on_change(listener: Callable[[], None]) -> None:
    """Calls `listener` after every change of the selection."""
    _listeners.append(listener)


def _select(name: str | None) -> None:
    global _forced
    with _lock:
        if name is not None:
            _require(name)
        before = _forced
        _forced = name
        try:
            _clear()
            for listener in _listeners:
                listener()
        except BaseException:
            _forced = before
            _clear()
            raise


def _clear() -> None:
    for device_type in list(_live):
        backend, _, library = _live.pop(device_type)
        library._destroy()
        backend.deactivate()


def _require(name: str) -> Backend:
    backend = registry.load(name)
    available = backend.probe()
    if not available.ok:
        raise BackendUnavailable(name, available.reason, available.remedy)
    return backend


def _choose(device_type: str) -> Backend:
    name = _forced or env.backend_requested()
    if name is not None:
        backend = _require(name)
        if backend.device_type != device_type:
            raise OpNotSupported(
                f"the selected backend {name!r} serves {backend.device_type!r} tensors, and this "
                f"one is on {device_type!r}; move it, or select another backend with use_backend"
            )
        return backend
    ready: dict[str, Backend] = {}
    reasons: list[str] = []
    for candidate in registry.installed():
        try:
            backend = registry.load(candidate)
        except Exception as error:  # a plugin for another device may be broken
            reasons.append(f"{candidate}: {type(error).__name__}: {error}")
            continue
        if backend.device_type != device_type:
            continue
        available = backend.probe()
        if available.ok:
            ready[candidate] = backend
        else:
            reasons.append(f"{candidate}: {available.reason}; {available.remedy}")
    if len(ready) == 1:
        return next(iter(ready.values()))
    if device_type in ready:
        return ready[device_type]
    if ready:
        raise BatchInvariantError(
            f"several backends serve {device_type!r}: {', '.join(sorted(ready))}; choose one with "
            f"use_backend or {env.BACKEND}"
        )
    raise BackendUnavailable(
        device_type,
        f"no installed backend can run on {device_type!r} tensors"
        + (f" ({'; '.join(reasons)})" if reasons else ""),
        f"install a backend package for {device_type!r}, or keep the tensors on the CPU",
    )


def _resolve(device_type: str) -> tuple[Backend, Mapping[str, Kernel]]:
    with _lock:
        if device_type not in _live:
            backend = _choose(device_type)
            table = backend.kernels()
            if unknown := set(table) - set(CONTRACTS):
                raise BatchInvariantError(
                    f"the backend {backend.name!r} has kernels for operators without a contract: "
                    f"{', '.join(sorted(unknown))}"
                )
            backend.activate()
            try:
                library = _register(backend, table, dispatch_key(device_type))
            except BaseException:
                backend.deactivate()
                raise
            _live[device_type] = (backend, table, library)
        backend, table, _ = _live[device_type]
        return backend, table


def _register(backend: Backend, table: Mapping[str, Kernel], key: str) -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Oo]verrid")
        for name in CONTRACTS:
            fn = table[name].fn if name in table else _missing(backend.name, name)
            library.impl(name, fn, key)
    return library


def _missing(backend: str, op: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise OpNotSupported(
            f"the backend {backend!r} has no kernel for {op!r}; `bi doctor` lists what it has"
        )

    return refuse


def _first_call(op: str) -> Callable[..., Any]:
    """What runs on a device without registered kernels: registers them, or says why not."""

    def resolve(*args: Any, **kwargs: Any) -> Any:
        tensor = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        table = kernels(tensor.device.type)
        if op not in table:
            _missing(current_backend(tensor.device).name, op)()
        return table[op].fn(*args, **kwargs)

    return resolve


_fallback = torch.library.Library(NAMESPACE, "IMPL")
for _name in CONTRACTS:
    _fallback.impl(_name, _first_call(_name), "CompositeExplicitAutograd")
