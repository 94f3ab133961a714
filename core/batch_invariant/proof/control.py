"""The negative control of the transforms: plain torch under the same ones, on this machine."""

from __future__ import annotations

import dataclasses

from batch_invariant import mode
from batch_invariant.proof.invariance import invariance
from batch_invariant.proof.log import Log
from batch_invariant.proof.subject import Subject
from batch_invariant.proof.transforms import LEVELS


def stock_varies(subject: Subject) -> list[str] | None:
    """The transforms of a batch under which torch's own operator changes bits here.

    None where it cannot be called: the mode is on, there is no kernel to compare with, the backend
    does not compute on torch tensors, or torch has no kernel for this dtype on this device.
    """
    kernel = subject.kernel
    if kernel is None or not subject.on_torch or mode.is_enabled():
        return None
    plain = dataclasses.replace(kernel, fn=subject.op.reference)
    stock = dataclasses.replace(subject, kernel=plain)
    found = []
    for transform, level in LEVELS.items():
        if level > subject.level or transform not in subject.transforms():
            continue
        log = Log()
        try:
            invariance(stock, log, transform)
        except (RuntimeError, TypeError):
            return None
        if log.breaks:
            found.append(transform)
    return found
