"""Triton kernels that a program launches itself, past the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from batch_invariant.places import kernel_name


@contextmanager
def seen(show: Callable[[str], None]) -> Iterator[None]:
    """Calls `show` with the name of every Triton kernel, before it is launched."""
    kinds = _kinds()
    stock = [kind.run for kind in kinds]
    for kind, run in zip(kinds, stock, strict=True):
        kind.run = _shown(run, show)
    try:
        yield
    finally:
        for kind, run in zip(kinds, stock, strict=True):
            kind.run = run


def _kinds() -> list[Any]:
    """What `@triton.jit` makes of a function: to be compiled, or interpreted."""
    if find_spec("triton") is None:
        return []
    return [
        import_module("triton.runtime.jit").JITFunction,
        import_module("triton.runtime.interpreter").InterpretedFunction,
    ]


def _shown(run: Callable[..., Any], show: Callable[[str], None]) -> Callable[..., Any]:
    def launch(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("warmup"):
            show(kernel_name(kernel))
        return run(kernel, *args, **kwargs)

    return launch
