"""Which backends are installed: entry points listed and loaded. The only importer of stevedore.

Listing imports no plugin. Loading checks the class against `Backend` and says which distribution
is at fault, since the reader of the error may have written neither side.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from batch_invariant.backend import API_VERSION, Backend
from batch_invariant.errors import BatchInvariantError, InvalidBackend, UnknownBackend

GROUP = "batch_invariant.backends"
DEVICES = "torch.backends"
"""Packages that torch imports last of all, since they bring devices; this one is among them."""


def installed() -> dict[str, EntryPoint]:
    """The entry points by backend name; two packages that provide one name are an error."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        first = found.setdefault(entry.name, entry)
        if first.value != entry.value or distribution_of(first) != distribution_of(entry):
            one, other = (f"{distribution_of(e)} ({e.value})" for e in (first, entry))
            raise BatchInvariantError(
                f"two packages provide the backend {entry.name!r}: {one} and {other}; "
                "uninstall one of them"
            )
    return found


def import_devices() -> None:
    """Imports the packages of out-of-tree devices, which torch may import only after this one.

    One that fails is left to torch, which names it when its turn comes.
    """
    for entry in entry_points(group=DEVICES):
        if not entry.value.startswith("batch_invariant:"):
            with contextlib.suppress(Exception):
                entry.load()


@functools.cache
def load(name: str) -> Backend:
    """The backend of that name, constructed once per process."""
    entries = installed()
    if name not in entries:
        raise UnknownBackend(name, list(entries))
    entry = entries[name]
    cls = _import(name)
    _check(cls, name, distribution_of(entry))
    try:
        backend: Backend = cls()
    except Exception as error:  # a plugin may raise anything
        raise InvalidBackend(
            f"the backend {name!r} of {distribution_of(entry)} cannot be constructed: "
            f"{type(error).__name__}: {error}; leave what may fail to probe()"
        ) from error
    return backend


def distribution(name: str) -> str:
    """Name and version of the package that provides a backend."""
    return distribution_of(installed()[name])


def distribution_of(entry: EntryPoint) -> str:
    """Name and version of the package of an entry point."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


def _import(name: str) -> Any:
    from stevedore.driver import DriverManager
    from stevedore.exception import NoMatches

    try:
        driver: Any = DriverManager(GROUP, name, invoke_on_load=False).driver
    except NoMatches as error:
        raise BatchInvariantError(
            f"the backend {name!r} is installed, but stevedore's cache does not know it yet; "
            "delete the folder python-entrypoints in the user's cache folder "
            "($XDG_CACHE_HOME, or ~/.cache)"
        ) from error
    except Exception as error:  # whatever a plugin raises while it is imported
        raise InvalidBackend(
            f"the backend {name!r} of {distribution(name)} does not import: "
            f"{type(error).__name__}: {error}; import the vendor's SDK in kernels(), not at the top"
        ) from error
    return driver


def _check(cls: object, name: str, distribution: str) -> None:
    """Refuses a class that does not keep the contract, before anything of it runs."""

    def refuse(what: str) -> InvalidBackend:
        return InvalidBackend(f"the backend {name!r} of {distribution} {what}")

    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise refuse(
            f"is not a class derived from batch_invariant.backend.Backend: {cls!r}; "
            "its entry point must name the class"
        )
    version = getattr(cls, "api_version", None)
    if version != API_VERSION:
        raise refuse(
            f"is written for api_version {version}, and this batch-invariant has {API_VERSION}; "
            "install matching versions of both"
        )
    if getattr(cls, "name", None) != name:
        raise refuse(f"calls itself {getattr(cls, 'name', None)!r}; the two names must be equal")
    if not isinstance(getattr(cls, "device_type", None), str):
        raise refuse("does not say its device_type, a torch device type such as 'cuda'")
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise refuse(f"does not define {', '.join(missing)}")
    for method in (
        "probe",
        "kernels",
        "aten_overrides",
        "aten_harmless",
        "vendor_overrides",
        "gaps",
        "tuner",
        "evidence",
        "activate",
        "deactivate",
        "to_native",
        "to_torch",
    ):
        expected = list(inspect.signature(getattr(Backend, method)).parameters)
        found = list(inspect.signature(getattr(cls, method)).parameters)
        if expected != found:
            raise refuse(
                f"defines {method}({', '.join(found)}); expected {method}({', '.join(expected)})"
            )
