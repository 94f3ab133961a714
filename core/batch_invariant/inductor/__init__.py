"""The promise inside `torch.compile`.

Inductor lowers operators below the dispatcher, where no override is seen. So while the mode is on,
what Dynamo hands to Inductor is traced with our table of decompositions (`table`): an operator
that the mode makes invariant becomes the same `batch_invariant` operator as in eager, one whose
stock kernel is kept becomes an opaque call of the dispatcher (`opaque`), one that is refused
raises, and Inductor generates code only for what is exact (`fusible`). What it scheduled is then
looked at (`scheduled`). A graph compiled under one setting of the mode is never run under another
(`switch`).

Importing Dynamo takes seconds, so it is left alone until somebody else imports it. This file
connects the mode, and an audit, to it; docs/compile.md explains the whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from batch_invariant.inductor.arrival import Undo, on_import, withdraw
from batch_invariant.inductor.rules import Device, Rules, Watcher
from batch_invariant.ops import CONTRACTS

__all__ = ["Device", "Rules", "Watcher", "hold", "release", "rules_held", "watched"]

COMPILED_ON = frozenset({"cpu", "cuda"})
"""Device types whose generated code was checked. Where the mode covers another one as well,
compiled functions run eagerly while it is on: right, and not faster."""

_held: Rules | None = None
_audit: Rules | None = None
_effective: Rules | None = None


def hold(rules: Rules) -> None:
    """Compiled code obeys `rules`, from now on or as soon as Dynamo and Inductor are imported."""
    global _held
    _held = rules
    _renew()


def release() -> None:
    """Restores what `hold` found; graphs compiled under it are kept for the next time."""
    global _held
    if _held is not None:
        refuse_inside_compiled_code()
        _held = None
        _renew()


@contextmanager
def watched(off: Rules, watcher: Watcher) -> Iterator[None]:
    """Everything that is compiled inside is compiled anew, and shown to the watcher.

    off: the rules that the mode would have, for what runs while it is off.
    """
    global _audit
    refuse_inside_compiled_code()
    before, _audit = _audit, replace(off, watcher=watcher)
    _renew()
    try:
        yield
    finally:
        _audit = before
        _renew()


def rules_held() -> Rules | None:
    """The rules that compiled code obeys now, or None while the mode is off and nobody watches."""
    return _effective


def refuse_inside_compiled_code() -> None:
    """Raises inside a compiled region, which was entered under the setting that is to change."""
    if "torch._dynamo.eval_frame" in sys.modules:
        from batch_invariant.inductor import switch

        switch.refuse_inside_compiled_code()


def _renew() -> None:
    global _effective
    withdraw()
    for op in CONTRACTS.values():
        for name in op.composite:
            # Tracing goes through torch's dispatcher in Python, which remembers what it found.
            getattr(torch.ops.aten, name).default._dispatch_cache.clear()
    _effective = _held
    if _audit is not None:
        _effective = _audit if _held is None else replace(_held, watcher=_audit.watcher)
    if _effective is None:
        return
    if _effective.enforced and not COMPILED_ON.issuperset(_effective.devices):
        on_import("torch._dynamo.eval_frame", _run_eagerly)
        return
    on_import("torch._dynamo.eval_frame", _switch)
    on_import("torch._inductor.compile_fx", _compile)


def _switch() -> Undo:
    from batch_invariant.inductor import switch

    return switch.install()


def _run_eagerly() -> Undo:
    from batch_invariant.inductor import switch

    return switch.run_eagerly()


def _compile() -> Undo:
    from batch_invariant.inductor import compile_fx

    return compile_fx.install()
