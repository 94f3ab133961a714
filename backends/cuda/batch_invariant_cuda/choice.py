"""The schedule of a product that no table lists: by the expected time of a few good ones."""

from __future__ import annotations

import torch

from batch_invariant_cuda.problem import cdiv
from batch_invariant_cuda.schedules import Schedule, parse

_STEP = {
    "tma 128x256x64 w8 s4 persistent halves": 0.67,
    "ring 128x128+64x64 w8 s4": 0.55,
    "ring 128x128+32x64 w8 s5": 0.47,
    "ring 128x128x64 w8 s6": 0.36,
    "ring 128x64+32x64 w8 s6": 0.33,
    "ring 64x128+32x64 w4 s6": 0.26,
    "ring 64x128x64 w4 s7": 0.215,
    "ring 64x64x128 w4 s5": 0.17,
}
"""Microseconds for a depth of 64 of one tile, measured on an H200 with one tile on each SM."""

_WAVE, _FOLD = 2.0, 3.5
"""Microseconds to begin and end a tile, and to begin and end the kernel that adds the chunks."""

_MOST_SPREAD = 2**14
"""Chunks of an fp32 tile that are worth their room in memory: 256 MiB."""

_TRAFFIC = 2.5e6
"""Bytes of chunks that are written and read again in a microsecond, on an H200."""


def default(
    m: int, n: int, k: int, dtype: torch.dtype, *, bulk: bool, chunk: int, programs: int
) -> Schedule:
    """A good schedule for the shape.

    bulk: whether the operands may be copied in bulk. chunk: the k of one chunk that may be
    computed beside others, 0 if there is none. programs: the number of multiprocessors.
    """
    split = " split" if chunk else ""
    if dtype is torch.float32:
        return _single(m, n, bulk, cdiv(k, chunk) if chunk else 0, programs)
    if m > 64 and bulk:
        return _large(m, n, k, chunk, programs)
    if not bulk:  # few kinds: each is compiled anew for every way in which operands can lie
        if m > 64:
            return parse("tile 128x128x64 w8 s3" if m > 128 else "tile 64x64x64 w4 s4")
        return parse(f"tile 64x64x64 w4 s4{split}" if m > 16 else f"tile 16x32x128 w4 s5{split}")
    rows = 16 if m <= 16 else 32 if m <= 32 else 64
    if n >= 75 * programs:
        return parse(f"tma {rows}x128x128 w4 s{5 if rows == 16 else 4} swap{split}")
    if rows == 16:
        return parse(f"tma 16x64x256 w4 s5 swap{split}")
    return parse(f"tma 32x64x128 w4 s6 swap{split}")


def _large(m: int, n: int, k: int, chunk: int, programs: int) -> Schedule:
    best, least = "", float("inf")
    for text, step in _STEP.items():
        s = parse(text)
        if chunk and s.bn > 128:  # the sum of the chunks needs registers too
            continue
        cost = _cost(text, step, m, n, k, programs)
        if cost < least:
            best, least = text, cost
        if chunk:
            units = cdiv(m, s.bm) * cdiv(n, s.bn + s.bn2) * cdiv(k, chunk)
            cost = cdiv(units, programs) * (step * chunk / 64 + _WAVE) + _FOLD
            cost += 4 * m * n * cdiv(k, chunk) / _TRAFFIC
            if cost < least:
                best, least = f"{text} split apart", cost
    return parse(best)


def _single(m: int, n: int, bulk: bool, chunks: int, programs: int) -> Schedule:
    """fp32 on the ordinary arithmetic units; chunks: how many may be computed side by side."""
    split = " split" if chunks else ""
    if not bulk:
        if m <= 16:
            return parse(f"tile 16x32x64 w4 s3{split}")
        if m * n < 64 * 64 * 128:
            return parse(f"tile 32x64x32 w4 s3{split}")
        return parse("tile 128x64x16 w4 s3" if m * n < 128**3 else "tile 128x128x16 w4 s3")
    if m <= 32:
        rows = 8 if m <= 8 else 16 if m <= 16 else 32
        if n <= 16 * programs:
            return parse(f"fma {rows}x64x32 w4 s5 c{3 if rows == 32 else 4}{split}")
        return parse(f"fma {rows}x128x32 w4 s4 c{2 if rows == 32 else 3}{split}")
    whole = 2 * programs
    tiles = cdiv(m, 64) * cdiv(n, 64)
    spread = tiles % whole
    full = spread == 0 or whole - spread < whole // 16
    if not chunks or full or spread * chunks > _MOST_SPREAD:
        return parse("fma 64x64x32 w4 s6 c2")
    if tiles < whole // 2:
        return parse("fma 64x64x32 w4 s4 c3 split apart early")
    return parse("fma 64x64x64 w4 s3 c2 hybrid apart early")


def tf32(m: int, n: int) -> Schedule:
    """For fp32 operands in TF32: schedules that were seen to have the bits of the contract's."""
    if m <= 16:
        return parse("tile 16x64x32 w4 s4 swap")
    return parse("tile 64x64x32 w4 s4" if m * n < 128**3 else "tile 128x128x32 w8 s3")


def _cost(text: str, step: float, m: int, n: int, k: int, programs: int) -> float:
    """Expected microseconds where one program computes a tile."""
    s = parse(text)
    tiles = cdiv(m, s.bm) * cdiv(n, s.bn + s.bn2)
    return cdiv(tiles, programs) * (step * k / 64 + _WAVE)


def contract(dtype: torch.dtype) -> Schedule:
    """The plain schedule that every other one is compared with."""
    if dtype is torch.float32:
        return parse("tile 32x32x32 w4 s2")
    return parse("tile 64x64x64 w4 s3")
