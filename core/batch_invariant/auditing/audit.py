"""`audit`: runs a function and reports every operator and generated kernel that ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from batch_invariant import inductor, mode
from batch_invariant.auditing.report import Report
from batch_invariant.auditing.watch import Watch


def audit(fn: Callable[..., Any], /, *args: Any, strict: bool = False, **kwargs: Any) -> Report:
    """What `fn(*args, **kwargs)` runs, operator by operator: covered, harmless or uncovered.

    fn: any callable or nn.Module, eager or compiled. It is called once, as it is: with the mode on
    inside `with bi.enabled()`, or where it turns the mode on itself. Compiled functions are
    compiled anew, without caches, so that what Inductor makes of them is seen: the operators that
    a graph calls, as the dispatcher gets them, and every loop that is generated.

    strict: raise `UncoveredOpError`, with the line of code, at the first uncovered one, before it
    runs. Otherwise nothing is raised for it, also not by the check of compiled code; operators that
    the mode refuses raise as ever.

    Not seen: other threads, Triton kernels and extensions that are called past the dispatcher, and
    code compiled ahead of time.
    """
    with auditing(strict) as found:
        result = fn(*args, **kwargs)
        on = mode.is_enabled()
    return found(getattr(fn, "__qualname__", None) or type(fn).__name__, on, result)


@contextmanager
def auditing(strict: bool) -> Iterator[Callable[[str, bool, Any], Report]]:
    """Watches what runs inside; yields what makes the report of it.

    It takes the name of what ran, whether the mode was on, and the result.
    """
    devices = {device_type: mode.plan(device_type) for device_type in mode.device_types()}
    off = inductor.Rules(devices, frozenset(), enforced=False)
    watch = Watch(off, strict)

    def report(function: str, on: bool, result: Any) -> Report:
        names = [d.backend.split(" of ")[0] for d in devices.values() if d.backend]
        state = f"on ({', '.join(names)})" if on else "off"
        return Report(function, state, dict(watch.ran), watch.graphs, result)

    with inductor.watched(off, watch), watch:
        yield report
