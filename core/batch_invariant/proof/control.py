"""The negative control of the transforms: plain torch under the same ones, on this machine."""

from __future__ import annotations

import dataclasses

from batch_invariant import mode
from batch_invariant.proof.invariance import invariance
from batch_invariant.proof.log import Log
from batch_invariant.proof.subject import Subject
from batch_invariant.proof.transforms import LEVELS


def stock_varies(subject: Subject) -> list[str]:
    """The transforms of a batch under which torch's own operator changes bits here.

    Empty where it does not, or where it cannot be called (the mode is on, or the backend does not
    compute on torch tensors).
    """
    kernel = subject.kernel
    if kernel is None or not subject.on_torch or mode.is_enabled():
        return []
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
            return []  # no kernel of torch for this dtype on this device
        if log.breaks:
            found.append(transform)
    return found
