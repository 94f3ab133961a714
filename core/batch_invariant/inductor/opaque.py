"""Operators that Inductor cannot look into: each calls one aten overload through the dispatcher.

There the mode's override takes the call, as in eager, or torch's own kernel where the mode leaves
it alone. They have the schemas of their aten overloads, in the namespace `batch_invariant_aten`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

NAMESPACE = "batch_invariant_aten"

_library = torch.library.Library(NAMESPACE, "DEF")


@functools.cache
def opaque(func: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The opaque operator of a functional aten overload; defined at the first call."""
    name = func.name().removeprefix("aten::")
    schema = str(func._schema).removeprefix("aten::")
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def call(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)

    _library.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", call, lib=_library)
    packet = getattr(getattr(torch.ops, NAMESPACE), name.partition(".")[0])
    found: torch._ops.OpOverload = getattr(packet, func._overloadname)
    return found


def aten_of(func: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The aten overload that an opaque operator calls; None for any other operator."""
    if func.namespace != NAMESPACE:
        return None
    packet = getattr(torch.ops.aten, func._schema.name.split("::")[1])
    found: torch._ops.OpOverload = getattr(packet, func._overloadname)
    return found
