"""`audit`: runs a function and reports every operator and generated kernel that ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from batch_invariant import inductor, mode
from batch_invariant.auditing import launches
from batch_invariant.auditing.report import Report
from batch_invariant.auditing.watch import Watch
from batch_invariant.errors import ConfigurationError


def audit(
    fn: Callable[..., Any],
    /,
    *args: Any,
    strict: bool = False,
    trusted: Iterable[str] = (),
    **kwargs: Any,
) -> Report:
    """What `fn(*args, **kwargs)` runs, operator by operator: covered, harmless or uncovered.

    fn: any callable or nn.Module, eager or compiled. It is called once, as it is: with the mode on
    inside `with bi.enabled()`, or where it turns the mode on itself. Compiled functions are
    compiled anew, without caches, so that what Inductor makes of them is seen: the operators that
    a graph calls, as the dispatcher gets them, and every loop that is generated. Triton kernels
    that the program launches itself, or has in compiled code, are uncovered.

    strict: raise `UncoveredOpError`, with the line of code, at the first uncovered one, before it
    runs. Otherwise nothing is raised for it, also not by the check of compiled code; operators that
    the mode refuses raise as ever.

    trusted: names of Triton kernels ("my_kernel") and of operators of other libraries ("lib::op")
    that somebody has checked; they are harmless then.

    Not seen: other threads, extensions that are called past the dispatcher, Triton kernels that are
    launched as compiled binaries, and code compiled ahead of time.
    """
    if isinstance(trusted, str):
        raise ConfigurationError(f"trusted={trusted!r}: expected a list of names")
    with auditing(strict, trusted) as found:
        result = fn(*args, **kwargs)
        on = mode.is_enabled()
    return found(getattr(fn, "__qualname__", None) or type(fn).__name__, on, result)


@contextmanager
def auditing(
    strict: bool, trusted: Iterable[str] = ()
) -> Iterator[Callable[[str, bool, Any], Report]]:
    """Watches what runs inside; yields what makes the report of it.

    It takes the name of what ran, whether the mode was on, and the result.
    """
    devices = {device_type: mode.plan(device_type) for device_type in mode.device_types()}
    off = inductor.Rules(devices, frozenset(), enforced=False)
    watch = Watch(off, strict, frozenset(trusted))

    def report(function: str, on: bool, result: Any) -> Report:
        names = [d.backend.split(" of ")[0] for d in devices.values() if d.backend]
        state = f"on ({', '.join(names)})" if on else "off"
        return Report(function, state, dict(watch.ran), watch.graphs, result)

    with launches.seen(watch.launched), inductor.watched(off, watch), watch:
        yield report
