"""The order of the additions, measured: one at every size of the batch, and the declared one."""

from __future__ import annotations

import torch

from batch_invariant.order import digest
from batch_invariant.proof.fingerprint import order_of
from batch_invariant.proof.log import Log
from batch_invariant.proof.subject import Subject


def can_be_seen(subject: Subject) -> bool:
    """The contract has a probe, and the dtype can show it."""
    probe = subject.op.probe
    # Terms that cannot be negative show their order only in the last place of an fp32 sum.
    return probe is not None and (probe.value is None or torch.finfo(subject.dtype).bits >= 32)


def structure(subject: Subject, log: Log) -> None:
    """One fingerprint at several sizes of the batch, equal to the tree that the kernel declares."""
    assert subject.kernel is not None
    prints = order_of(subject.op, subject.run, subject.dtype)
    first = prints[0]
    log.figures["fingerprint"] = first.digest
    log.figures["terms"] = first.terms
    log.figures["text"] = first.text
    for other in prints[1:]:
        found = None if other.digest == first.digest else f"{other.text}, and {first.text} with 1"
        log.compare(found, f"the order of {other.terms} additions with {other.rows} rows is")
    declared = subject.kernel.order_of(subject.dtype)
    tree = declared.tree(first.terms)
    if tree is not None:
        found = (
            None if digest(tree) == first.digest else f"{declared}, and {first.text} is measured"
        )
        log.compare(found, f"the declared order of {first.terms} additions is")
