"""Whether one operator, as it was called, keeps the promise, and who says so."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from batch_invariant import coverage, selector
from batch_invariant.inductor import pairs
from batch_invariant.inductor.fusible import may_fuse
from batch_invariant.inductor.opaque import aten_of
from batch_invariant.inductor.rules import Device, Rules
from batch_invariant.ops import CONTRACTS
from batch_invariant.ops.register import NAMESPACE

COVERED, HARMLESS, UNCOVERED = "covered", "harmless", "uncovered"

_EXACT_NUMBERS = "whole numbers and booleans: exact in any order"
_BY_BACKEND = "the backend {} computes it alike wherever an element stands"
_STOCK = "torch's own kernel ran: {}"
_UNKNOWN = "an operator of {}, which nobody has classified; bi.verify can try it"
_MEMORY = "memory and metadata: no element is computed"
_PLAIN = frozenset({"prims", "inductor", "_c10d_functional", "rngprims", "profiler", "debugprims"})


@dataclass(frozen=True)
class Verdict:
    """kind: covered, harmless or uncovered. why: for what is not covered. kernel, guarantee, order:
    of what is."""

    kind: str
    why: str
    kernel: str = ""
    guarantee: str = ""
    order: str = ""

    def __str__(self) -> str:
        if self.kind != COVERED or not self.kernel:
            return self.why
        return "; ".join(part for part in (self.kernel, self.guarantee, self.order) if part)


def of_call(func: Any, values: Sequence[Any], rules: Rules) -> Verdict:
    """The verdict on a call of an operator with these arguments, flat, under these rules."""
    if not isinstance(func, torch._ops.OpOverload):
        return Verdict(
            UNCOVERED, f"{func}: a higher-order operator, which an audit cannot see into"
        )
    func = aten_of(func) or func
    device_type = _device_type(values)
    if func.namespace == NAMESPACE:
        own = func._schema.name.split("::")[1]
        if own not in CONTRACTS:
            return Verdict(COVERED, "it computes by operators of the contracts alone")
        return _contract(own, device_type, _dtype(values))
    if func.namespace == pairs.NAMESPACE:
        part = pairs.PARTS[func._schema.name.split("::")[1]]
        return _contract(part, device_type, torch.float32)
    if func.namespace != "aten":
        if func.namespace in _PLAIN:
            return Verdict(HARMLESS, _MEMORY)
        return Verdict(UNCOVERED, _UNKNOWN.format(func.namespace))
    name = func.name().removeprefix("aten::")
    device = rules.devices.get(device_type)
    if device is None:
        if func.is_view or coverage.harmless(name) in (coverage.VIEW, coverage.FACTORY):
            return Verdict(HARMLESS, coverage.VIEW)
        return Verdict(UNCOVERED, f"no rules for tensors on {device_type!r}")
    return _aten(name, device, device_type, values, rules)


def _aten(
    name: str, device: Device, device_type: str, values: Sequence[Any], rules: Rules
) -> Verdict:
    exact = not any(d.is_floating_point or d.is_complex for d in _dtypes(values))
    if name in device.overridden or name in device.refused:
        if exact:
            return Verdict(HARMLESS, _EXACT_NUMBERS)
        if not rules.enforced:
            if _rounds_once(name, device, values):
                return Verdict(HARMLESS, coverage.EXACT)
            return Verdict(UNCOVERED, _STOCK.format("the mode is off"))
        if rules.allows(name):
            return Verdict(UNCOVERED, _STOCK.format("it is named in allow="))
        if name in device.refused:
            return Verdict(UNCOVERED, device.refused[name].text)
        contract = _contract_of(name)
        if contract is not None:
            return _contract(contract, device_type, _dtype(values))
        return Verdict(COVERED, "", _BY_BACKEND.format(device.backend.split(" of ")[0]))
    return Verdict(HARMLESS, coverage.harmless(name, device.harmless) or coverage.DECOMPOSES)


def _rounds_once(name: str, device: Device, values: Sequence[Any]) -> bool:
    base, _, overload = name.partition(".")
    func = getattr(getattr(torch.ops.aten, base), overload or "default")
    return may_fuse(func, None, device, values)


def _contract(op: str, device_type: str, dtype: torch.dtype | None) -> Verdict:
    backend = selector.current_backend(device_type)
    kernel = selector.kernels(device_type).get(op)
    if kernel is None:
        return Verdict(UNCOVERED, f"the backend {backend.name!r} has no kernel for {op!r}")
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        return Verdict(HARMLESS, _EXACT_NUMBERS)
    try:
        order = str(kernel.order_of(dtype)) if dtype is not None else ""
    except KeyError:
        order = ""
    return Verdict(COVERED, "", f"{op} of {backend.name}", kernel.guarantee.name.lower(), order)


@functools.cache
def _contract_of(name: str) -> str | None:
    """The contract behind an overload, or behind the functional one of an out= or in-place one."""
    base = name.split(".")[0]
    for op in CONTRACTS.values():
        for listed in (*op.aten, *op.composite):
            if name == listed or base.rstrip("_") == listed.split(".")[0]:
                return op.name
    return None


def _device_type(values: Sequence[Any]) -> str:
    types = [v.device.type for v in values if isinstance(v, torch.Tensor)]
    types += [v.type for v in values if isinstance(v, torch.device)]
    return next((t for t in types if t != "cpu"), "cpu")


def _dtypes(values: Sequence[Any]) -> list[torch.dtype]:
    found = [v.dtype for v in values if isinstance(v, torch.Tensor)]
    return found + [v for v in values if isinstance(v, torch.dtype)]


def _dtype(values: Sequence[Any]) -> torch.dtype | None:
    found = [v.dtype for v in values if isinstance(v, torch.Tensor)]
    return next((d for d in found if d.is_floating_point), next(iter(found), None))
