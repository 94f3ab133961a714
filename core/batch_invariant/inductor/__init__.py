"""The promise inside `torch.compile`.

Inductor lowers operators below the dispatcher, where no override is seen. So while the mode is on,
what Dynamo hands to Inductor is traced with our table of decompositions (`table`): an operator
that the mode makes invariant becomes the same `batch_invariant` operator as in eager, one whose
stock kernel is kept becomes an opaque call of the dispatcher (`opaque`), one that is refused
raises, and Inductor generates code only for what is exact. What it scheduled is then looked at
(`scheduled`). A graph compiled under one setting of the mode is never run under another (`switch`).

Importing Dynamo takes seconds, so it is left alone until somebody else imports it. This file
connects the mode to it; docs/compile.md explains the whole.
"""

from __future__ import annotations

import sys

from batch_invariant.inductor.arrival import Undo, on_import, withdraw
from batch_invariant.inductor.rules import Device, Rules

__all__ = ["Device", "Rules", "hold", "release", "rules_held"]

_held: Rules | None = None


def hold(rules: Rules) -> None:
    """Compiled code obeys `rules`, from now on or as soon as Dynamo and Inductor are imported."""
    global _held
    refuse_inside_compiled_code()
    release()
    _held = rules
    on_import("torch._dynamo.eval_frame", _switch)
    on_import("torch._inductor.compile_fx", _compile)


def release() -> None:
    """Restores what `hold` found; graphs compiled under it are kept for the next time."""
    global _held
    if _held is None:
        return
    refuse_inside_compiled_code()
    _held = None
    withdraw()


def rules_held() -> Rules | None:
    """The rules that compiled code obeys now, or None while the mode is off."""
    return _held


def refuse_inside_compiled_code() -> None:
    """Raises inside a compiled region, which was entered under the setting that is to change."""
    if "torch._dynamo.eval_frame" in sys.modules:
        from batch_invariant.inductor import switch

        switch.refuse_inside_compiled_code()


def _switch() -> Undo:
    from batch_invariant.inductor import switch

    return switch.install()


def _compile() -> Undo:
    from batch_invariant.inductor import compile_fx

    return compile_fx.install()
