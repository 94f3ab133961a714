"""The slots in shared memory that long 16-bit rows pass through, written in Gluon.

A program has an eighth of each of its rows (`cluster.py`): of every tile of 1024 elements the 128
lanes that are its own. 32 tiles, four segments of a row, fill a slot; a row has Q slots, the last
one with T tiles. Slots are filled and emptied in a ring: where the s-th slot of a program's i-th
row comes to lie is told by `where`. The warps that read a slot last send for what takes its place.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mbarrier

from batch_invariant_cuda import cluster, rows
from batch_invariant_cuda.cluster import LINE, WIDTH
from batch_invariant_cuda.row_launch import Plan, shared_memory

WARPS = gl.constexpr(8)  # that make results
LANES = gl.constexpr(rows.LANES)
DEPTH = gl.constexpr(rows.SEGMENT // rows.LANES)
TILES = gl.constexpr(32)
SLOT = gl.constexpr(TILES.value * rows.LANES)  # elements of a row in a slot, all programs together
_MOST = 8  # slots of a row


def slots_of(n: int) -> tuple[int, int]:
    """Q and T of rows of n elements."""
    tiles = -(-n // LANES.value)
    slots = -(-tiles // TILES.value)
    return slots, tiles - (slots - 1) * TILES.value


def fits(x: torch.Tensor, shape: Plan) -> bool:
    """Whether a cluster can share the rows of x [rows, n]: of 16 bits, aligned, and not too long.

    There must be 227 KiB of shared memory for a program, which says that there are clusters too.
    """
    if x.element_size() != 2 or not x.is_cuda or shape.unit == 1 or shape.tiles:
        return False
    return slots_of(x.size(1))[0] <= _MOST and shared_memory(x.device.index) >= 227 << 10


def most_slots(slots: int) -> int:
    """Of a ring for rows of so many slots.

    With no more a row is not complete before results are made of the row that had the same turn in
    a mailbox before it: so what was told of that one has been heard by all.
    """
    return (cluster.TURNS.value + 1) * slots - 1


@gluon.constexpr_function
def wide(size, warps):
    """A slot for some warps, in pieces that are 16 bytes as numbers of `size` bytes."""
    across = WIDTH.value * size // 16
    return gl.BlockedLayout([1, 16 // size], [32 // across, across], [warps, 1], [1, 0])


@gluon.constexpr_function
def plain(rank):
    """Tensors of that rank as they are counted, one behind another."""
    return gl.SwizzledSharedLayout(1, 1, 1, [*range(rank)][::-1])


@gluon.jit
def places(layout: gl.constexpr):
    """Where the elements of a slot are in a row, if it is the row's first."""
    tile = gl.expand_dims(gl.arange(0, TILES, gl.SliceLayout(1, layout)), 1)
    lane = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)), 0)
    return tile * LANES + lane + gl.program_id(0) % cluster.PROGRAMS * WIDTH


@gluon.jit
def where(i, s, Q: gl.constexpr, SLOTS: gl.constexpr):
    """The slot in the ring, and the phase of its barrier."""
    at = i * Q + s
    return at % SLOTS, at // SLOTS & 1


@gluon.jit
def copy(x, n, count, row, s, at, slots, slot, Q: gl.constexpr):
    """Begins the copy of slot s of a row, from Q on of the rows that this program has later."""
    later = row + s // Q * (gl.num_programs(0) // cluster.PROGRAMS)
    start = s % Q * SLOT
    left = gl.where(later < count, n - start, 0)
    begin = gl.minimum(later, count - 1).to(gl.int64) * n + start
    async_copy.async_copy_global_to_shared(slots.index(slot), x + begin + at, mask=at < left)


@gluon.jit
def send_for(x, n, count, row, s, at, slots, slot, ready, Q: gl.constexpr):
    """`copy`, and has it told when all copies that a thread has begun are there."""
    copy(x, n, count, row, s, at, slots, slot, Q)
    async_copy.mbarrier_arrive(ready.index(slot), increment_count=False)


@gluon.jit
def tiles_of(slots):
    """All tiles of a ring, one after another."""
    return slots._reinterpret(slots.dtype, [slots.shape[0] * TILES, WIDTH], plain(1))


@gluon.jit
def nothing(i, s, slot, given):
    """For `lanes_of`: what is read is still needed."""


@gluon.jit
def lanes_of(
    slots, others, ready, given, n, i, part: gl.constexpr, leave: gl.constexpr,
    Q: gl.constexpr, T: gl.constexpr, SLOTS: gl.constexpr, AHEAD: gl.constexpr = 0,
):  # fmt: skip
    """The lanes of a program's i-th row, slot after slot as they are ready, in segments.

    part(slots, others, first, T, within, given): the lanes of T tiles from `first` on of the ring,
    and of a ring beside it; of the last one those that are within.
    leave(i, s, slot, given): what to do when a slot has been read.
    AHEAD: 1 if slots are ready before they are for the first time.

    Those that take every other row see every other use of a slot. They cannot take one for the use
    before: that was told earlier, since an arrival waits for all copies a thread has begun before.
    """
    everywhere = gl.full([WIDTH], True, gl.int1, LINE)
    first_lane = gl.program_id(0) % cluster.PROGRAMS * WIDTH
    in_last = ((Q - 1) * TILES + T - 1) * LANES
    within = first_lane + gl.arange(0, WIDTH, LINE) < n - in_last
    lanes = gl.zeros([WIDTH], gl.float32, LINE)
    for s in range(Q - 1):
        slot, phase = where(i, s, Q, SLOTS)
        mbarrier.wait(ready.index(slot), phase ^ AHEAD)
        for first in range(slot * TILES, (slot + 1) * TILES, DEPTH):
            lanes += part(slots, others, first, DEPTH, everywhere, given)
        leave(i, s, slot, given)
    slot, phase = where(i, Q - 1, Q, SLOTS)
    mbarrier.wait(ready.index(slot), phase ^ AHEAD)
    last: gl.constexpr = (T - 1) // DEPTH * DEPTH
    for first in range(slot * TILES, slot * TILES + last, DEPTH):
        lanes += part(slots, others, first, DEPTH, everywhere, given)
    lanes += part(slots, others, slot * TILES + last, T - last, within, given)
    leave(i, Q - 1, slot, given)
    return lanes
