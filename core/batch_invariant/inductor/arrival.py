"""Calls something as soon as a module is imported by somebody else, and undoes it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

_waiting: dict[str, Callable[[], Undo]] = {}
_undo: list[Undo] = []

Undo = Callable[[], None]


def on_import(module: str, install: Callable[[], Undo]) -> None:
    """Calls `install` now if the module is there, else right after its import.

    What it returns is called by `withdraw`.
    """
    if _ready(module):
        _undo.append(install())
        return
    _waiting[module] = install
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def withdraw() -> None:
    """Undoes everything that was installed, and forgets what still waits."""
    _waiting.clear()
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    while _undo:
        _undo.pop()()


def _ready(module: str) -> bool:
    """Whether it is imported to its end, not just begun."""
    found = sys.modules.get(module)
    spec = getattr(found, "__spec__", None)
    return found is not None and not getattr(spec, "_initializing", False)


class _Loader(importlib.abc.Loader):
    """Loads a module with its own loader, then installs."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        install = _waiting.pop(module.__name__, None)
        if install is not None:
            _undo.append(install())
        if not _waiting and _finder in sys.meta_path:
            sys.meta_path.remove(_finder)


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for the import of the modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _waiting:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


_finder = _Finder()
