"""Overloads of aten operators by name, such as `add.Tensor` and `add_.Tensor`, on CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def parts(name: str) -> tuple[str, str]:
    base, _, overload = name.partition(".")
    return base, overload or "default"


def schema(name: str) -> torch._C.FunctionSchema:
    base, overload = parts(name)
    found: torch._C.FunctionSchema = getattr(getattr(torch.ops.aten, base), overload)._schema
    return found


def has_kernel(name: str) -> bool:
    return bool(torch._C._dispatch_has_kernel(f"aten::{name}"))


def is_native(name: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CPU"))


def variants(name: str) -> Iterator[tuple[str, list[str]]]:
    """The native overloads that compute what a functional one does, with the names of their outs.

    An in-place overload writes its first argument and has no outs.
    """
    base, _ = parts(name)
    wanted = [str(a.type) for a in schema(name).arguments]
    for packet in (base, f"{base}_"):
        if not hasattr(torch.ops.aten, packet):
            continue
        for found in getattr(torch.ops.aten, packet).overloads():
            full = packet if found == "default" else f"{packet}.{found}"
            arguments = schema(full).arguments
            outs = [a.name for a in arguments if a.is_out]
            inputs = [str(a.type) for a in arguments if not a.is_out]
            functional = packet == base and not outs
            if inputs == wanted and is_native(full) and (full == name or not functional):
                yield full, outs


def bind(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every argument by name, with the schema's defaults."""
    arguments = schema(name).arguments
    given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    return {a.name: given.get(a.name, a.default_value) for a in arguments}
