"""Watches a call: the dispatcher for what it calls, and Inductor for what it compiles and runs."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batch_invariant import clash
from batch_invariant.auditing.report import COMPILED, EAGER, GENERATED, Ran
from batch_invariant.auditing.verdict import COVERED, HARMLESS, UNCOVERED, Verdict, of_call
from batch_invariant.inductor.opaque import aten_of
from batch_invariant.inductor.rules import Rules
from batch_invariant.places import running_line

_OWN_TRITON = "a Triton kernel of the program, which nobody has classified"
_TRUSTED = "trusted by who asked for this audit; it was not looked at"
_REPLACED = "another library has put its own kernel in the place of the mode's"
_EXACT_LOOP = "a generated loop of exact operations, low precision rounded after each"


class Watch(TorchDispatchMode):
    """Records what runs inside; `strict` raises before the first uncovered operator.

    off: the rules of what runs while the mode is off. trusted: operators of other libraries, and
    Triton kernels, that are not called uncovered.
    """

    def __init__(self, off: Rules, strict: bool, trusted: frozenset[str] = frozenset()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.strict = strict
        self.trusted = trusted
        self.ran: dict[Ran, int] = {}
        self.graphs = 0
        self._off = off
        self._running: list[list[Any]] = []
        self._calling = False

    def launched(self, kernel: str) -> None:
        """Records a Triton kernel; one that an operator launches is part of that operator."""
        if not self._calling:
            self._add(Ran(kernel, EAGER, self._of_triton(kernel), _running_place()))

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles under this mode; what compiled code calls is still dispatched to it."""
        return True

    def scheduled(self, kernels: list[Any]) -> None:
        """Counts a compiled graph."""
        self.graphs += 1

    @contextmanager
    def runs(self, kernels: list[Any]) -> Iterator[None]:
        """Records the generated kernels of a graph; the calls that it makes are dispatched."""
        for kernel in kernels:
            if kernel.kind == "triton":
                verdict = self._of_triton(kernel.name)
                self._add(Ran(kernel.name, COMPILED, verdict, kernel.place, kernel.origins))
            elif kernel.kind == "generated" or kernel.wrong:
                kind = UNCOVERED if kernel.wrong else HARMLESS
                verdict = Verdict(kind, kernel.wrong or _EXACT_LOOP)
                self._add(Ran(kernel.name, GENERATED, verdict, kernel.place, kernel.origins))
        self._running.append(kernels)
        try:
            yield
        finally:
            self._running.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from batch_invariant.inductor import rules_held

        kwargs = kwargs or {}
        rules = rules_held() or self._off
        values = tree_leaves((args, kwargs))
        if not self._running and _is_composite(func, rules, values):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        shown = aten_of(func) or func
        how = COMPILED if self._running else EAGER
        verdict = of_call(func, values, rules)
        if verdict.kind == COVERED and clash.is_replaced(func.name()):
            verdict = Verdict(UNCOVERED, _REPLACED)
        name = str(shown.name()).partition(".")[0]
        if name in self.trusted and not name.startswith("aten::"):
            verdict = Verdict(HARMLESS, _TRUSTED)
        self._add(Ran(shown.name(), how, verdict, self._place(func)))
        before, self._calling = self._calling, True
        try:
            return func(*args, **kwargs)
        finally:
            self._calling = before

    def _of_triton(self, kernel: str) -> Verdict:
        if kernel in self.trusted:
            return Verdict(HARMLESS, _TRUSTED)
        return Verdict(UNCOVERED, _OWN_TRITON)

    def _add(self, ran: Ran) -> None:
        self.ran[ran] = self.ran.get(ran, 0) + 1
        if self.strict and ran.verdict.kind == UNCOVERED:
            raise ran.error()

    def _place(self, func: Any) -> str:
        if self._running:
            places = [k.place for k in self._running[-1] if k.name == func.name() and k.place]
            return places[0] if places else ""
        return _running_place()


def _running_place() -> str:
    file, line = running_line()
    text = linecache.getline(file, line).strip()
    return f"{file}:{line}" + (f"  {text}" if text else "") if file else ""


def _is_composite(func: Any, rules: Rules, values: list[Any]) -> bool:
    """Whether its parts are what runs: a composite operator that the mode does not override.

    Without autograd, a dispatch mode is shown composites whole.
    """
    if not isinstance(func, torch._ops.OpOverload) or func.namespace != "aten":
        return False
    if not func._can_decompose():
        return False
    name = func.name().removeprefix("aten::")
    on = rules.enforced
    return not any(
        name in device.refused or (on and name in device.overridden)
        for device in rules.devices.values()
    )
