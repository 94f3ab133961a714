"""The table of decompositions with which graphs are traced while the mode is on.

AOTAutograd looks every operator up as it traces, in the forward and in the backward pass, also
those that other decompositions and derivative formulas call. So nothing that is covered can be
taken apart, fused or lowered before it is seen here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from batch_invariant import coverage
from batch_invariant.errors import UncoveredOpError
from batch_invariant.inductor.fusible import always_fused, may_fuse
from batch_invariant.inductor.opaque import opaque
from batch_invariant.inductor.rules import Device, Rules
from batch_invariant.ops import CONTRACTS
from batch_invariant.places import traced_line

Decomposition = Callable[..., Any]


class Table(dict[torch._ops.OpOverload, Decomposition]):
    """Decompositions that follow rules; where caches ask for its bytes, it is those rules."""

    def __init__(self, rules: Rules, stock: Mapping[Any, Decomposition]) -> None:
        super().__init__(stock)
        self.rules = rules
        for name in {n for device in rules.devices.values() for n in _names(device)}:
            func = _overload(name)
            if func is not None and not func._schema.is_mutable and not _views(func):
                self[func] = _Rewrite(func, rules, stock.get(func))

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (self.rules.identity,)


def _names(device: Device) -> Iterator[str]:
    """The overloads of a device that Inductor must not always lower itself."""
    yield from device.overridden
    for name in device.overloads:
        func = _overload(name)
        if func is None or not always_fused(func, coverage.harmless(name, device.harmless)):
            yield name


class _Rewrite:
    """What becomes of one aten overload in a graph."""

    def __init__(
        self, func: torch._ops.OpOverload, rules: Rules, stock: Decomposition | None
    ) -> None:
        self.func = func
        self.name = func.name().removeprefix("aten::")
        self.rules = rules
        self.stock = stock
        self.of_number = _of_number(func)
        for called in (func, self.of_number):
            # Now, not when it is traced: a graph from a cache on disk calls it untraced.
            opaque(called)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = tree_leaves((args, kwargs), is_leaf=lambda value: value is None)
        device = self.rules.devices.get(_device_type(values))
        if device is None:
            return self._inductor(args, kwargs)
        if self.rules.allows(self.name):
            return self._opaque(args, kwargs)
        if self.name in _contracts():
            if device.fault is not None:
                raise device.fault.with_traceback(None)
            return _contracts()[self.name](*self._positional(args), **kwargs)
        reason = coverage.harmless(self.name, device.harmless)
        given = self._given(args, kwargs)
        if may_fuse(self.func, reason, device, given, self.rules.eager_bits):
            return self._inductor(args, kwargs)
        refused = device.refused.get(self.name)
        if refused is not None and not (refused.only_floating and not _inexact(values)):
            if device.fault is not None:
                raise device.fault.with_traceback(None)
            raise UncoveredOpError(
                f"aten::{self.name}", ", ".join(map(_describe, values)), refused.text + _line()
            )
        return self._opaque(args, kwargs)

    def _opaque(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call of the dispatcher. Torch takes numbers for tensors; an opaque operator does not,
        and calls the overload that is for numbers."""
        given = zip((a.type for a in self.func._schema.arguments), args, strict=False)
        number = any(
            isinstance(kind, torch.TensorType) and isinstance(value, _NUMBERS)
            for kind, value in given
        )
        return opaque(self.of_number if number else self.func)(*args, **kwargs)

    def _positional(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The positional arguments with aten's defaults, which the contracts do not have."""
        expected = [a for a in self.func._schema.arguments if not a.kwarg_only]
        return (*args, *(a.default_value for a in expected[len(args) :]))

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The value of every argument, defaults included."""
        named = dict(zip((a.name for a in self.func._schema.arguments), args, strict=False))
        named |= kwargs
        return [named.get(a.name, a.default_value) for a in self.func._schema.arguments]

    def _inductor(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return NotImplemented if self.stock is None else self.stock(*args, **kwargs)


_NUMBERS = (int, float, complex, torch.SymInt, torch.SymFloat, torch.SymBool)


def _of_number(func: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The overload that takes a number as its second operand, or else the same one."""
    name = func._overloadname
    wanted = "Scalar" if name == "default" else name.replace("Tensor", "Scalar", 1)
    found = getattr(torch.ops.aten, func._schema.name.removeprefix("aten::"))
    if wanted == name or wanted not in found.overloads():
        return func
    number: torch._ops.OpOverload = getattr(found, wanted)
    other = [a.name for a in number._schema.arguments]
    return number if other == [a.name for a in func._schema.arguments] else func


@functools.cache
def _contracts() -> dict[str, Decomposition]:
    """The operator of a contract for each overload that the mode sends to one, adapted to it."""
    found: dict[str, Decomposition] = {}
    for op in CONTRACTS.values():
        for name, adapter in {**op.aten, **op.composite}.items():
            found[name] = (
                op.overload if adapter is None else functools.partial(adapter, op.overload)
            )
    return found


@functools.cache
def _overload(name: str) -> torch._ops.OpOverload | None:
    base, _, overload = name.partition(".")
    packet = getattr(torch.ops.aten, base, None)
    return getattr(packet, overload or "default", None)


def _views(func: torch._ops.OpOverload) -> bool:
    return any(r.alias_info is not None for r in func._schema.returns)


def _device_type(values: list[Any]) -> str:
    """Where the call runs: on the accelerator, if any of its tensors is there."""
    types = [v.device.type for v in values if isinstance(v, torch.Tensor)]
    types += [v.type for v in values if isinstance(v, torch.device)]
    return next((t for t in types if t != "cpu"), "cpu")


def _inexact(values: list[Any]) -> bool:
    dtypes = [v.dtype if isinstance(v, torch.Tensor) else v for v in values]
    return any(isinstance(d, torch.dtype) and (d.is_floating_point or d.is_complex) for d in dtypes)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)


def _line() -> str:
    """Where the program calls what is being traced, as far as the trace knows."""
    stack = torch.fx.traceback.get_current_meta().get("stack_trace")
    return f". It is called at {traced_line(stack)}" if stack else ""
