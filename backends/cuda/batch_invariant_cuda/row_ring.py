"""The slots in shared memory that long 16-bit rows pass through, written in Gluon.

A program has an eighth of each of its rows (`cluster.py`): of every tile of 1024 elements the 128
lanes that are its own. 32 tiles, four segments of a row, fill a slot; a row has Q slots, the last
one with T tiles. Slots are filled and emptied in a ring: where the s-th slot of a program's i-th
row comes to lie is told by `where`. The warps that read a slot last send for what takes its place.

Two groups of four warps add up rows, a lane in each thread (`add_up`).

The rings that a row passes through have, with the slots that adders hold in registers, at most
(cluster.TOLD + 1) Q - 1 slots. With more, a row could be complete before results are made of the
row that was told of in the same place, and not all might have heard of that.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from batch_invariant_cuda import cluster, rows
from batch_invariant_cuda.cluster import LINE, WIDTH, send_lanes
from batch_invariant_cuda.row_launch import Plan, shared_memory
from batch_invariant_cuda.turns import hand_on, take

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
def numbers(v):
    """What has been read in a layout of `wide`, in fp32: a pair at a time where they are bf16."""
    if v.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r", [v], gl.float32, True, 2,
        )  # fmt: skip
    else:  # noqa: RET505  (compiled by Triton, for which this is no end of the function)
        return v.to(gl.float32)


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
def _added(lanes, parts, i, s, turns, GROUP: gl.constexpr, TOGETHER: gl.constexpr, Q: gl.constexpr):
    """The segments of a slot added to the lanes of those before."""
    if TOGETHER:
        zeros = gl.zeros([WIDTH], gl.float32, LINE)
        lanes = gl.where(s > 0, take(turns, i * Q + s, GROUP), zeros)
    for part in gl.static_range(len(parts)):
        lanes += parts[part]
    return lanes


@gluon.jit
def add_up(
    slots, given, n, i, turns, mailbox, segments: gl.constexpr,
    GROUP: gl.constexpr, TOGETHER: gl.constexpr,
    Q: gl.constexpr, T: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Adds up a program's i-th row, and sends its lanes.

    TOGETHER: two groups take the slots of all rows in turn. Each adds up the segments of its slot,
    and then these to the lanes that the other hands on. Otherwise a group has the row for itself.

    segments(slots, i, s, T, within, given): the lanes of each segment of the T tiles of the row's
    s-th slot; of the last tile those that are within. All of a slot at a time: so much is on its
    way then that few warps are enough.
    """
    everywhere = gl.full([WIDTH], True, gl.int1, LINE)
    lanes = gl.zeros([WIDTH], gl.float32, LINE)
    first = (i * Q + GROUP) % 2 if TOGETHER else 0
    for s in range(first, Q - 1, 2 if TOGETHER else 1):
        parts = segments(slots, i, s, TILES, everywhere, given)
        lanes = _added(lanes, parts, i, s, turns, GROUP, TOGETHER, Q)
        if TOGETHER:
            hand_on(lanes, turns, GROUP)
    if not TOGETHER or (i * Q + Q - 1 - GROUP) % 2 == 0:
        first_lane = gl.program_id(0) % cluster.PROGRAMS * WIDTH
        in_last = ((Q - 1) * TILES + T - 1) * LANES
        within = first_lane + gl.arange(0, WIDTH, LINE) < n - in_last
        parts = segments(slots, i, Q - 1, T, within, given)
        lanes = _added(lanes, parts, i, Q - 1, turns, GROUP, TOGETHER, Q)
        send_lanes(lanes, mailbox, i)
        if TOGETHER:
            hand_on(lanes, turns, GROUP)
