"""Keeps code under `torch.compile` from leaving the mode.

Inductor lowers operators below the dispatcher, where no override is seen, so compiled code would
run stock kernels. While the mode is on, compiled functions therefore run eagerly (torch's
`force_eager` stance), also those compiled earlier. Importing Dynamo takes seconds, so it is left
alone until somebody else imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

_DYNAMO = "torch._dynamo"
_stance: Any = None
_held = False


def hold() -> None:
    """Makes compiled functions run eagerly, now or as soon as Dynamo is imported."""
    global _held
    if _held:
        return
    _held = True
    if _DYNAMO in sys.modules:
        _set()
    else:
        sys.meta_path.insert(0, _finder)


def release() -> None:
    """Restores what `hold` found."""
    global _held
    if not _held:
        return
    _held = False
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    else:
        _restore()


def _set() -> None:
    global _stance
    _stance = torch.compiler.set_stance("force_eager")


def _restore() -> None:
    global _stance
    stance, _stance = _stance, None
    stance.__exit__(None, None, None)


class _Loader(importlib.abc.Loader):
    """Loads Dynamo with its own loader, then sets the stance."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
            _set()


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for the import of Dynamo."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _DYNAMO:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


_finder = _Finder()
