"""What kernels share that hold 16-bit rows in shared memory and registers, written in Gluon.

For long rows a program has a multiprocessor to itself, takes row after row and reads each once.
Shared memory has a slot for each of a row's first segments, registers the tiles behind them.
Order as in `rows.py`.
"""

# ruff: noqa: RUF005  (compiled by Triton, which knows less of Python)
from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from batch_invariant_cuda import rows
from batch_invariant_cuda.row_launch import Plan, multiprocessors, shared_memory

LANES = gl.constexpr(rows.LANES)
SEGMENT = gl.constexpr(rows.SEGMENT)
DEPTH = gl.constexpr(rows.SEGMENT // rows.LANES)

prefetch_bytes = gluon.jit(rows.prefetch.fn)
rounded = gluon.jit(rows.rounded.fn)
take_turn = gluon.jit(rows.take_turn.fn)


@gluon.constexpr_function
def lane_layout(warps):
    return gl.BlockedLayout([1024 // (32 * warps)], [32], [warps], [0])


@gluon.constexpr_function
def _fold_layout(warps):
    return gl.BlockedLayout([16, 2], [1, 32], [1, warps], [1, 0])


@gluon.jit
def fold(lanes, WARPS: gl.constexpr):
    """`rows.fold` of 1024 lanes: each warp has all, sixteen of a residue modulo 64 in a thread."""
    v = gl.convert_layout(gl.reshape(lanes, [16, 64]), _fold_layout(WARPS))
    v = gl.sum(gl.reshape(v, [2, 8, 64]), 0)
    v = gl.sum(gl.reshape(v, [2, 4, 64]), 0)
    v = gl.sum(gl.reshape(v, [2, 2, 64]), 0)
    v = gl.sum(v, 0)
    v = gl.sum(gl.reshape(v, [2, 32]), 0)
    v = gl.sum(gl.reshape(v, [2, 16]), 0)
    v = gl.sum(gl.reshape(v, [2, 8]), 0)
    v = gl.sum(gl.reshape(v, [2, 4]), 0)
    v = gl.sum(gl.reshape(v, [2, 2]), 0)
    return gl.sum(v, 0) + 0.0


@gluon.jit
def fetch(row, there, slots, s, WARPS: gl.constexpr):
    """Begins the copy of segment s of a row, if it is there, to its slot."""
    at = gl.arange(0, SEGMENT, gl.BlockedLayout([8], [32], [WARPS], [0]))
    async_copy.async_copy_global_to_shared(
        slots.index(s), row + s * SEGMENT + at, mask=(at >= 0) & there
    )
    async_copy.commit_group()


@gluon.jit
def prefetch(row, s):
    """Begins to bring segment s of a row to the L2 cache."""
    prefetch_bytes(row + s * SEGMENT, SEGMENT * 2)


@gluon.jit
def fetch_rest(
    row, columns, n, S: gl.constexpr, T: gl.constexpr, first: gl.constexpr, last: gl.constexpr,
    FILL: gl.constexpr,
):  # fmt: skip
    """Tiles first to last - 1 of the T of a row from segment S on; FILL beyond its end."""
    rest = ()
    for t in gl.static_range(first, last):
        at = S * SEGMENT + t * LANES + columns
        if t < T - 1:
            rest = rest + (gl.load(row + at),)
        else:
            rest = rest + (gl.load(row + at, mask=at < n, other=FILL),)
    return rest


@gluon.jit
def segment_tiles(held, s, layout: gl.constexpr):
    """The terms of segment s."""
    found = ()
    for t in gl.static_range(DEPTH):
        found = found + (held.index(s * DEPTH + t).load(layout),)
    return found


_TILES = range(2, 49)  # of a row in registers
_SLOTS = 13  # segments of a row in shared memory; with a fourteenth there is no room to fold
_SHARED = 227 << 10  # bytes that one program may have


def place_of(x: torch.Tensor, shape: Plan) -> tuple[int, int, int] | None:
    """Programs, segments in shared memory and tiles in registers for long rows of x [rows, n].

    None where rows find no room, or are too few or too short to be worth it.
    """
    if x.element_size() != 2 or not x.is_cuda or shape.split or shape.unit == 1 or shape.tiles:
        return None
    count, n = x.shape
    tiles = -(-n // rows.LANES) - _SLOTS * DEPTH.value
    if tiles not in _TILES or shared_memory(x.device.index) < _SHARED:
        return None
    return min(count, multiprocessors(x.device.index)), _SLOTS, tiles
