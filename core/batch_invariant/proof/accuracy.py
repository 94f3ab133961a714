"""Accuracy against float64, within the contract's bound; exact where the contract has none."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from batch_invariant.ops.bits import mismatch
from batch_invariant.ops.contract import Case, Data
from batch_invariant.proof.log import Log
from batch_invariant.proof.subject import Subject, widened


def accuracy(subject: Subject, log: Log) -> None:
    """Every value is within the contract's bound of the exact result.

    Measures the largest error on normal data in ulps of the output's dtype, at the size of the
    exact value or, where that is smaller, of the root mean square of all of them: a value close to
    zero that is left of large ones has no smaller unit.

    Outputs behind those that the contract bounds (statistics) are checked on normal data,
    normwise: within (N u32 + 8 eps) max |exact|. An operator without a bound selects or copies: all
    its outputs are those of the definition, bit for bit.
    """
    op = subject.op
    for case, data, args in subject.inputs(Data if subject.full else (Data.NORMAL,)):
        outputs = subject.run(args)
        if op.error_bound is None:
            for which, want in enumerate(op.call(op.reference, args)):
                found = mismatch(want, outputs[which])
                log.compare(found, f"output {which} against the definition", case, data)
            continue
        wide = widened(args)
        exact = op.call(op.reference, wide)
        bound = op.error_bound(**{**wide, "dtype": outputs[0].dtype})
        bounds = bound if isinstance(bound, tuple) else (bound,)
        for which, allowed in enumerate(bounds):
            out, want = outputs[which], exact[which]
            error = _distance(out, want)
            what = f"output {which} against float64" if which else "against float64"
            log.compare(_beyond(out, want, error, allowed), what, case, data)
            if data is Data.NORMAL and not which:
                log.worst("ulps", round(_ulps(error, want, out.dtype), 3))
        if data is Data.NORMAL:
            _others(subject, case, args, outputs, exact, len(bounds), log)


def _distance(out: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Absolute error; none where both are the same infinity."""
    return torch.where(out.double() == exact, 0, (out.double() - exact).abs())


def _beyond(
    out: torch.Tensor, exact: torch.Tensor, error: torch.Tensor, bound: torch.Tensor
) -> str | None:
    # A result beyond the dtype's range is rightly infinite.
    overflow = exact.abs() > torch.finfo(out.dtype).max
    rightly = overflow & (out.double() == torch.inf * exact.sign())
    wrong = ~(error <= bound) & ~rightly
    if not bool(wrong.any()):
        return None
    worst = float((error / bound)[wrong].max())
    first = tuple(int(i) for i in wrong.nonzero()[0])
    return (
        f"{int(wrong.sum())} of {out.numel()} values beyond the bound, the first at {list(first)}: "
        f"{float(out[first]):.9g} for {float(exact[first]):.9g}, worst {worst:.3g} bounds"
    )


def _others(
    subject: Subject,
    case: Case,
    args: Mapping[str, Any],
    outputs: tuple[torch.Tensor, ...],
    exact: tuple[torch.Tensor, ...],
    bounded: int,
    log: Log,
) -> None:
    asked = len(case.out_axes or subject.op.out_axes)
    sizes = [value.shape for value in args.values() if isinstance(value, torch.Tensor)]
    longest = max((size for shape in sizes for size in shape), default=1)
    pairs = enumerate(zip(outputs[:asked], exact[:asked], strict=True))
    for which, (out, want) in itertools.islice(pairs, bounded, None):
        unit = longest * 2.0**-24 + 8 * torch.finfo(out.dtype).eps
        error = float((out.double() - want).abs().nan_to_num(nan=torch.inf).max())
        allowed = unit * float(want.abs().max())
        found = None if error <= allowed else f"off by {error:.3g}, and {allowed:.3g} is allowed"
        log.compare(found, f"output {which} against float64", case, Data.NORMAL)


def _ulps(error: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> float:
    size = torch.maximum(exact.abs(), exact.square().mean().sqrt())
    unit = torch.exp2(size.log2().floor()) * torch.finfo(dtype).eps
    return float((error / unit).nan_to_num(nan=0.0, posinf=0.0).max())
