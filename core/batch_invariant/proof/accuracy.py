"""Accuracy against float64, within the contract's bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from batch_invariant.ops.contract import Data, Op
from batch_invariant.proof.log import Log
from batch_invariant.proof.subject import Subject


def accuracy(subject: Subject, log: Log) -> None:
    """Every value of the first output is within the contract's bound of the exact result.

    Measures the largest error on normal data in ulps of the output's dtype, at the size of the
    exact value or, where that is smaller, of the root mean square of all of them: a value close to
    zero that is left of large ones has no smaller unit.
    """
    for case, data, args in subject.inputs(Data if subject.full else (Data.NORMAL,)):
        out = subject.run(args)[0]
        exact, bound = yardstick(subject.op, args, out.dtype)
        error = (out.double() - exact).abs()
        # A result beyond the dtype's range is rightly infinite.
        overflow = exact.abs() > torch.finfo(out.dtype).max
        wrong = ~(error <= bound) & ~(overflow & out.isinf())
        found = None
        if bool(wrong.any()):
            worst = float((error / bound)[wrong].max())
            first = [int(i) for i in wrong.nonzero()[0]]
            found = (
                f"{int(wrong.sum())} of {out.numel()} values beyond the bound, the first at "
                f"{first}: {float(out[tuple(first)]):.9g} for {float(exact[tuple(first)]):.9g}, "
                f"worst {worst:.3g} bounds"
            )
        log.compare(found, "against float64", case, data)
        if data is Data.NORMAL:
            log.worst("ulps", round(_ulps(error, exact, out.dtype), 3))


def yardstick(
    op: Op, args: Mapping[str, Any], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract's reference in float64, and the largest error that it allows."""
    assert op.error_bound is not None
    wide = {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point
        else (None if isinstance(value, torch.dtype) else value)
        for name, value in args.items()
    }
    return op.call(op.reference, wide)[0], op.error_bound(**{**wide, "dtype": dtype})


def _ulps(error: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> float:
    size = torch.maximum(exact.abs(), exact.square().mean().sqrt())
    unit = torch.exp2(size.log2().floor()) * torch.finfo(dtype).eps
    return float((error / unit).nan_to_num(nan=0.0, posinf=0.0).max())
