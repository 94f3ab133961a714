"""A product without its addresses and numbers, and what a schedule makes of it: tiles and room."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batch_invariant_cuda.schedules import Schedule

_LIMIT = 2**31 - 2**20
"""Offsets up to here fit 32 bits, with room for the tiles at the edges."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Problem:
    """What stays the same from call to call: everything but the addresses and the numbers.

    a: [M, K] or [B, M, K] and b: [K, N] or [B, K, N], as sizes and strides with a batch in front.
    addend: strides of [B, M, N], None if there is none.
    tf32: fp32 operands are rounded to TF32 by the matrix units, because the user asked for it.
    """

    dtype: torch.dtype
    batch: int
    m: int
    n: int
    k: int
    a: tuple[int, int, int]
    b: tuple[int, int, int]
    addend: tuple[int, int, int] | None
    scaled: bool
    chunk: int
    aligned: bool
    tf32: bool = False

    @property
    def a_along_k(self) -> bool:
        return self.a[2] == 1 or self.k == 1

    @property
    def b_along_k(self) -> bool:
        return self.b[1] == 1 or self.k == 1

    def shape(self, rank: int) -> tuple[int, ...]:
        """The result's, with or without the batch."""
        return (self.batch, self.m, self.n) if rank == 3 else (self.m, self.n)

    def bulk(self) -> bool:
        """Whether bulk copies can read both operands and write the result."""
        size = self.dtype.itemsize
        leading_a = self.a[1] if self.a_along_k else self.a[2]
        leading_b = self.b[2] if self.b_along_k else self.b[1]
        return (
            size in (2, 4)
            and self.batch == 1
            and self.aligned
            and min(self.m, self.n, self.k) > 0
            and (self.a_along_k or self.a[1] == 1)
            and (self.b_along_k or self.b[2] == 1)
            and all(step > 0 and step * size % 16 == 0 for step in (leading_a, leading_b, self.n))
            and (self.k > 1)
            and not self.wide_addend
            and max(self.m, self.n, self.k) < 2**31
        )

    @property
    def wide_addend(self) -> bool:
        return self.addend is not None and self._last(self.addend, self.m, self.n) > _LIMIT

    @property
    def wide_result(self) -> bool:
        return self.batch * (self.m + 512) * (self.n + 512) > _LIMIT

    def _last(self, strides: tuple[int, int, int], rows: int, columns: int) -> int:
        return (
            (self.batch - 1) * abs(strides[0])
            + (rows + 512) * abs(strides[1])
            + (columns + 512) * abs(strides[2])
        )

    def wide(self) -> bool:
        """Whether some offset needs 64 bits."""
        return (
            max(
                self._last(self.a, self.m, self.k),
                self._last(self.b, self.k, self.n),
            )
            > _LIMIT
            or self.wide_result
            or self.wide_addend
        )

    def refuses(self, s: Schedule) -> str | None:
        """Why that schedule cannot compute this; None if it can."""
        if s.kernel != "tile" and self.tf32:
            return "TF32 is computed by 'tile' alone"
        if s.kernel != "tile" and not self.bulk():
            return "bulk copies need rows at multiples of 16 bytes, no batch and no float64"
        if s.kernel != "tile" and (s.kernel == "fma") != (self.dtype is torch.float32):
            return f"'{s.kernel}' does not compute {self.dtype}"
        if s.split and not self.chunk:
            return "there are no chunks to split"
        if s.split and (self.batch > 1 or self.wide()):
            return "chunks of a batch, or of a huge product, are not split"
        if s.swap and s.kernel == "tma" and (s.persistent or (self.chunk and not s.split)):
            return "swapped operands by bulk copies need one program for each tile and chunk"
        if s.swap and s.kernel == "tma" and self.wide_result:
            return "swapped operands by bulk copies store at offsets of 32 bits"
        if self.chunk % s.bk:
            return f"a depth of {s.bk} does not divide the chunk, {self.chunk}"
        return None


def units(p: Problem, s: Schedule) -> int:
    """How many tiles there are, of all matrices of the batch."""
    return p.batch * cdiv(p.m, s.bm) * cdiv(p.n, s.bn + s.bn2)


def whole_tiles(p: Problem, s: Schedule, programs: int) -> int:
    """How many tiles one program computes alone; the chunks of the others are spread."""
    tiles = units(p, s)
    if not s.split:
        return tiles
    wave = programs * s.beside
    return tiles // wave * wave if s.hybrid else 0


def workspace_size(p: Problem, s: Schedule, programs: int) -> int:
    """fp32 values that the chains of all chunks take; 0 if no chunk is split off."""
    if not s.split:
        return 0
    spread = units(p, s) - whole_tiles(p, s, programs)
    return spread * cdiv(p.k, p.chunk) * s.bm * (s.bn + s.bn2)


def counter_count(p: Problem, s: Schedule, programs: int) -> int:
    """Counters that a launch needs: one for each spread tile, or for each group's half of it."""
    if not s.split or s.apart:
        return 0
    spread = units(p, s) - whole_tiles(p, s, programs)
    return spread * (s.warps // 4 if s.kernel in ("ring", "fma") else 1)


def few_chunks(p: Problem, s: Schedule) -> int:
    """The number of chunks that are spread, if their sum is worth unrolling; else 0."""
    count = cdiv(p.k, p.chunk) if s.split else 0
    return count if count <= 8 else 0
