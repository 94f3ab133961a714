"""Where two terms of a sum meet, by masks: one query of the method of FPRev.

A sum of units has +M at leaf i and -M at leaf j, M so large that adding a unit to it changes
nothing. Units that are added to a partial sum that holds M are lost; M and -M cancel exactly where
the two meet, and what is added after that counts. So the result tells how many leaves lie below
the addition at which i and j meet.

Source: Xie, Huang, et al., FPRev: Revealing the Order of Floating-Point Summation, 2024,
arXiv 2411.00442.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from batch_invariant.proof.order.unseen import OutOfReach, Unseen

Integers = NDArray[np.int64]
Sums = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Masks:
    """The values: M = `big`, and at most `chunk` terms `unit` at once, which the result counts."""

    big: float
    unit: float
    chunk: int


def masks(dtype: torch.dtype, result: torch.dtype, n: int, divided: bool) -> Masks:
    """Values for inputs of `dtype` and a result of another dtype, of the sum or of the mean.

    Raises `OutOfReach` if n is too large for the dtype.
    """
    digits = 1 - int(np.log2(torch.finfo(result).eps))  # 24 for float32
    # A quotient is rounded, so a bit is kept back to tell one count from the next.
    chunk = 2 ** (digits - 1 if divided else digits)
    if dtype != torch.float16:
        big = 1.5 * 2.0 ** (900 if dtype == torch.float64 else 120)
        # Counted in pieces, or else all at once: partial sums beyond 2**24 would be rounded.
        if torch.finfo(result).bits >= 32 and n > chunk:
            raise OutOfReach(f"{n} terms are too many: {result} counts to {chunk}")
        return Masks(big, 1.0, chunk)
    big = 1.5 * 2.0**15
    unit = 2.0**-24
    if divided and result == torch.float16:
        # The mean of the units must stand in steps of the smallest float.
        unit *= 4 * 2.0 ** int(np.ceil(np.log2(n)))
    # Half a unit of the last place of M in an fp32 accumulator is 2**-9.
    chunk = min(chunk, int(2.0**-9 / unit) - 1)
    if chunk < 1:
        raise OutOfReach(
            f"{n} terms are too many: the range of float16 does not hold a value that swallows "
            "units large enough for the mean of that many to be counted; take fewer terms"
        )
    return Masks(big, unit, chunk)


class Meeting:
    """Answers queries about the sum that `sums` computes, [probes, n] -> [probes]."""

    def __init__(self, sums: Sums, n: int, values: Masks, divided: bool, dtype: torch.dtype):
        self.sums, self.n, self.values, self.divided, self.dtype = sums, n, values, divided, dtype

    def __call__(self, pairs: Integers, group: Integers, groups: Sequence[Integers]) -> Integers:
        """How many leaves of a group lie below the meeting of a pair of its leaves.

        pairs: [queries, 2]; group: for each query the index in `groups`, lists of leaves.
        """
        big, unit, chunk = self.values.big, self.values.unit, self.values.chunk
        owner, members = [], []
        for which, leaves in enumerate(groups):
            for begin in range(0, len(leaves), chunk):
                owner.append(which)
                members.append(leaves[begin : begin + chunk])
        pieces = [np.flatnonzero(np.asarray(owner) == which) for which in range(len(groups))]
        query = np.concatenate([np.full(len(pieces[g]), q) for q, g in enumerate(group)])
        piece = np.concatenate([pieces[g] for g in group])
        lost = np.zeros(len(pairs), np.int64)
        step = max(1, 2**22 // self.n)
        for begin in range(0, len(query), step):
            q, p = query[begin : begin + step], piece[begin : begin + step]
            terms = np.zeros((len(q), self.n), np.float64)
            for at, which in enumerate(p):
                terms[at, members[which]] = unit
            each = np.arange(len(q))
            first, second = pairs[q].T
            terms[each, first] = 0
            terms[each, second] = 0
            there = np.count_nonzero(terms, axis=1)
            terms[each, first] = big
            terms[each, second] = -big
            found = self.sums(torch.from_numpy(terms).to(self.dtype)).double().numpy()
            counted = found * (self.n if self.divided else 1) / unit
            whole = np.rint(counted)
            wrong = ~np.isfinite(counted) | (whole < 0) | (whole > there)
            if wrong.any():
                at = int(np.argmax(wrong))
                raise Unseen(
                    f"with +-{big:g} at terms {first[at]} and {second[at]} among {there[at]} units "
                    f"the result counts {counted[at]:g} of them; this is no sum of the terms, or "
                    "it overflows inside"
                )
            np.add.at(lost, q, there - whole.astype(np.int64))
        return lost + 2
