"""The slots in shared memory that long 16-bit rows pass through, written in Gluon.

A program has a quarter of each of its rows (`cluster.py`): of every tile of 1024 elements the 256
lanes that are its own. Sixteen tiles, two segments of a row, fill a slot; a row has Q slots, the
last one with T tiles. Slots are filled and emptied in a ring: what comes to the s-th slot of a
program's i-th row is told by `where`. The threads that make a row's results send for what takes
its place, each for the very elements that it has read.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from batch_invariant_cuda import cluster, rows
from batch_invariant_cuda.cluster import LINE, WIDTH

WARPS = 8  # that make results
LANES = gl.constexpr(rows.LANES)
DEPTH = gl.constexpr(rows.SEGMENT // rows.LANES)
TILES = gl.constexpr(16)
SLOT = gl.constexpr(16 * rows.LANES)  # elements of a row in a slot, four programs together
BYTES = 16 * WIDTH.value * 2  # of a slot


def slots_of(n: int) -> tuple[int, int]:
    """Q and T of rows of n elements."""
    tiles = -(-n // LANES.value)
    slots = -(-tiles // TILES.value)
    return slots, tiles - (slots - 1) * TILES.value


@gluon.constexpr_function
def wide(size):
    """A slot for `WARPS` warps, in pieces that are 16 bytes as results of `size` bytes."""
    across = WIDTH.value * size // (32 * 16)
    return gl.BlockedLayout([1, 16 // size], [1, 32], [WARPS // across, across], [1, 0])


@gluon.constexpr_function
def plain(rank):
    return gl.SwizzledSharedLayout(1, 1, 1, [*range(rank)][::-1])


@gluon.jit
def places(layout: gl.constexpr):
    """Where the elements of a slot are in a row, if it is the row's first."""
    tile = gl.expand_dims(gl.arange(0, TILES, gl.SliceLayout(1, layout)), 1)
    lane = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)), 0)
    return tile * LANES + lane + gl.program_id(0) % cluster.PROGRAMS * WIDTH


@gluon.jit
def ends(n, Q: gl.constexpr, T: gl.constexpr):
    """Whether this program's lanes of a row's last tile are in the row."""
    lane = gl.program_id(0) % cluster.PROGRAMS * WIDTH + gl.arange(0, WIDTH, LINE)
    return lane < n - ((Q - 1) * TILES + T - 1) * LANES


@gluon.jit
def where(i, s, Q: gl.constexpr, SLOTS: gl.constexpr):
    """The slot in the ring, and the phase of its barrier."""
    at = i * Q + s
    return at % SLOTS, at // SLOTS & 1


@gluon.jit
def tiles_of(slots, SLOTS: gl.constexpr):
    """All tiles of the ring, one after another."""
    return slots._reinterpret(slots.dtype, [SLOTS * TILES, WIDTH], plain(1))


@gluon.jit
def send_for(x, n, count, row, s, at, slots, slot, Q: gl.constexpr):
    """Begins the copy of slot s of a row, from Q on of the rows that this program has later."""
    later = row + s // Q * (gl.num_programs(0) // cluster.PROGRAMS)
    start = s % Q * SLOT
    left = gl.where(later < count, n - start, 0)
    begin = gl.minimum(later, count - 1).to(gl.int64) * n + start
    async_copy.async_copy_global_to_shared(slots.index(slot), x + begin + at, mask=at < left)
