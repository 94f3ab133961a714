"""What a row's bits do not depend on: ordered promises, made by kernels and asked for by users."""

from __future__ import annotations

from enum import IntEnum


class Guarantee(IntEnum):
    """A promise about the bits of one row; each level includes those below it."""

    RUN_TO_RUN = 1
    """when the program is run"""
    BATCH = 2
    """batch size, position in the batch, contents of the other rows (NaN and inf too), padding"""
    SCHEDULE = 3
    """how its sequence was cut: chunked prefill, decode step, prefix-cache hit, packing"""
    PARALLEL = 4
    """the tensor-parallel world size"""

    def __str__(self) -> str:
        return self.name.lower()
