"""The order of the additions, measured: one at every size of the batch, and the declared one."""

from __future__ import annotations

import torch

from batch_invariant.order import digest
from batch_invariant.proof.log import Log
from batch_invariant.proof.order.fingerprint import Fingerprint, order_of
from batch_invariant.proof.subject import Subject


def can_be_seen(subject: Subject) -> bool:
    """The contract has a probe, and the dtype can show it."""
    probe = subject.op.probe
    # Terms that cannot be negative show their order only in the last place of an fp32 sum.
    return probe is not None and (probe.value is None or torch.finfo(subject.dtype).bits >= 32)


def structure(subject: Subject, log: Log) -> None:
    """One fingerprint at several sizes of the batch, equal to the tree that the kernel declares.

    One fingerprint is one tree, one accumulator and one rounding of the products. The tree must be
    all that there is to the sum: replayed on random data it gives the kernel's bits.
    """
    assert subject.kernel is not None
    prints = order_of(subject.op, subject.run, subject.dtype)
    first = prints[0]
    log.figures |= {"fingerprint": first.digest, "terms": first.terms, "text": first.text}
    for found in prints:
        what = f"{found.terms} additions with {found.rows} rows"
        if found is not first:
            same = found.bits == first.bits
            log.compare(
                None if same else f"{_text(found)}, and {_text(first)} with 1", f"{what} are"
            )
        for fault in found.faults:
            log.broken(f"{what}: {fault}")
        if found.replay is not None and found.replay.refuted:
            log.broken(f"{what}: replayed as {found.text}, {found.replay} random rows agree")
    declared = subject.kernel.order_of(subject.dtype)
    tree = declared.tree(first.terms)
    if tree is not None:
        same = digest(tree) == first.digest
        found_order = None if same else f"{declared}, and {first.text} is measured"
        log.compare(found_order, f"the declared order of {first.terms} additions is")


def _text(found: Fingerprint) -> str:
    parts = (found.text, found.replay and found.replay.accumulator, found.products)
    return " ".join(str(part) for part in parts if part)
