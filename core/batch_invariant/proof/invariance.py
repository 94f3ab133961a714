"""T1 to T7 on a kernel's forward pass: the rows that two calls share have the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from batch_invariant.ops.bits import mismatch
from batch_invariant.ops.variant import Variant
from batch_invariant.proof.log import Log, shapes
from batch_invariant.proof.subject import Outputs, Subject
from batch_invariant.proof.transforms import variants


def invariance(subject: Subject, log: Log, transform: str) -> None:
    """Compares every variant of one transform with the whole batch, on every case and data."""
    op = subject.op
    for case, data, args in subject.inputs():
        base = None
        for variant in variants(op, case.batch_axes or op.batch_axes, args, transform):
            base = subject.run(args) if base is None else base
            changed = subject.run(variant.args)
            found = compare(base, changed, case.out_axes or op.out_axes, variant)
            what = f"{shapes(args)} against {shapes(variant.args)} ({variant.label})"
            log.compare(found, what, case, data)


def compare(
    base: Outputs, changed: Outputs, out_axes: Sequence[int], variant: Variant
) -> str | None:
    """None if the rows that both calls computed have the same bits, else what differs."""
    if variant.arranged is not None:
        changed = variant.arranged(changed)
    for which, axis in enumerate(variant.axes or out_axes):
        before = base[which].index_select(axis, torch.tensor(variant.rows))
        after = changed[which].index_select(axis, torch.tensor(variant.at))
        if before.shape != after.shape or before.dtype != after.dtype:
            return (
                f"output {which} is {before.dtype}{list(before.shape)} and "
                f"{after.dtype}{list(after.shape)}"
            )
        if (found := mismatch(before, after)) is not None:
            row = variant.rows[found.first[axis]]
            return f"row {row} changed in {found}" + (f" of output {which}" if which else "")
    return None
