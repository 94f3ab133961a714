"""The order of `batch_invariant.ops.row_order` for Triton kernels: lanes, segments and folds.

Lane i of 1024 adds elements i, i + 1024, ... of a segment of 8192 elements one after another; the
segments' lanes are added in ascending order; the lanes are folded by halves. A fold is a reduction
over an axis of two elements, and a + b is b + a, so no layout can change its bits; a reduction over
a longer axis would leave the order to the compiler.

A row that fits is held in registers, as a tuple of tiles: T terms of each lane, P tiles of L lanes
for each term. A longer one is walked again for every pass, and T is 0. A row shorter than 1024 has
the next power of two as its number of lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

from batch_invariant_cuda.explog import exp, near_exp, near_short_exp, short_exp

LANES = 1024
SEGMENT = 8192
_LANES = tl.constexpr(LANES)
_SEGMENT = tl.constexpr(SEGMENT)
_DEPTH = tl.constexpr(SEGMENT // LANES)

VALUE = tl.constexpr(0)
MAGNITUDE = tl.constexpr(1)
NONZERO = tl.constexpr(2)
SQUARE = tl.constexpr(3)
SQUARED_DIFFERENCE = tl.constexpr(4)
EXPONENTIAL = tl.constexpr(5)
SHORT_EXPONENTIAL = tl.constexpr(6)  # for results of 16 bits
NEAR_EXPONENTIAL = tl.constexpr(7)  # of rows that `is_near` accepts
NEAR_SHORT_EXPONENTIAL = tl.constexpr(8)
POSITIVE_EXPONENTIAL = tl.constexpr(9)
FACTOR = tl.constexpr(10)

NEAR = tl.constexpr(60.0)
AHEAD = tl.constexpr(4)  # segments of a long row on their way, with the one that is added up


@triton.constexpr_function
def _overlaps():
    return not knobs.runtime.interpret and cuda_capability_geq(9, 0)


FEW = tl.constexpr(
    2048
)  # programs that may wait for their turn; more would cost more than it saves
FEW_SEGMENTS = tl.constexpr(128)  # the same where several launches make up a call


@triton.jit
def take_turn(LIMIT: tl.constexpr = FEW):
    """Waits for what was launched before, then lets the next launch begin; up to LIMIT programs.

    The first thing that a row kernel does: `RowKernel` lets it start while the kernel before it
    still runs, where the GPU can do that. The other way round, launches far ahead would wait on
    the multiprocessors that the running one needs.
    """
    if _overlaps():  # noqa: SIM102  (known when it is compiled; the other is not)
        if tl.num_programs(0) <= LIMIT:
            gdc_wait()
            gdc_launch_dependents()


@triton.jit
def prefetch(x, size):
    """Begins to bring `size` bytes from the pointer x on to the L2 cache; none if size <= 0.

    A hint, for GPUs that know it: address and size are multiples of 16.
    """
    if _overlaps():
        tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
            " setp.gt.and.s32 p, $2, 0, p;"
            " @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r",
            [x.to(tl.int64), size],
            tl.int32,
            False,
            1,
        )


@triton.constexpr_function
def is_far(term):
    """Whether a term is an exponential that `near_term` makes shorter."""
    return term in (EXPONENTIAL.value, SHORT_EXPONENTIAL.value)


@triton.constexpr_function
def near_term(term):
    """What has the bits of a term in rows that `is_near` accepts."""
    return term + NEAR_EXPONENTIAL.value - EXPONENTIAL.value if is_far(term) else term


@triton.constexpr_function
def is_near_term(term):
    """Whether `near_term` has made a term shorter."""
    return term in (NEAR_EXPONENTIAL.value, NEAR_SHORT_EXPONENTIAL.value)


@triton.constexpr_function
def exponential(bits, near):
    """The term of softmax for results of so many bits, or what does for it in near rows."""
    term = SHORT_EXPONENTIAL.value if bits == 16 else EXPONENTIAL.value
    return near_term(term) if near else term


@triton.jit
def term(x, shift, TERM: tl.constexpr):
    """What is added up, of elements x, in fp32 and rounded: see the constants above."""
    v = x.to(tl.float32)
    if TERM == MAGNITUDE:
        v = tl.abs(v)
    elif TERM == NONZERO:
        v = tl.where(v != 0.0, 1.0, 0.0)
    elif TERM == SQUARE:
        v = v * v
    elif TERM == SQUARED_DIFFERENCE:
        v = v - shift
        v = v * v
    elif TERM == EXPONENTIAL:
        v = exp(v - shift, True)
    elif TERM == POSITIVE_EXPONENTIAL:
        v = exp(v - shift, False)
    elif TERM == NEAR_EXPONENTIAL:
        v = near_exp(v - shift)
    elif TERM == SHORT_EXPONENTIAL:
        v = short_exp(v - shift)
    elif TERM == NEAR_SHORT_EXPONENTIAL:
        v = near_short_exp(v - shift)
    return v


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _times(a, b):
    return a * b


@triton.jit
def combine(a, b, TERM: tl.constexpr):
    """a + b, or a * b where the terms are factors."""
    if TERM == FACTOR:
        return a * b
    else:  # noqa: RET505
        return a + b


@triton.jit
def fold(v, TERM: tl.constexpr):
    """Lanes [L] folded by halves to one total; a sum of nothing but -0.0 is +0.0.

    The total is a scalar: with a tensor of one element here, the compiler was seen to give every
    thread all the lanes, back to the loads.
    """
    for _ in tl.static_range(0, 9):
        if v.shape[0] > 2:
            halves = tl.reshape(v, (2, v.shape[0] // 2))
            v = tl.reduce(halves, 0, _times) if TERM == FACTOR else tl.reduce(halves, 0, _plus)
    if TERM == FACTOR:
        return tl.reduce(v, 0, _times)
    else:  # noqa: RET505  (Triton compiles what follows a plain return)
        return tl.reduce(v, 0, _plus) + 0.0


@triton.jit
def load_tile(
    x,
    columns,
    n,
    t: tl.constexpr,
    T: tl.constexpr,
    FULL: tl.constexpr,
    FILL: tl.constexpr,
    P: tl.constexpr = 1,
):
    """Tile t of T of a row that begins at the pointer x; FILL beyond its end, in the last P."""
    at = t * columns.shape[0] + columns
    if FULL or t < T - P:
        return tl.load(x + at)
    else:  # noqa: RET505
        return tl.load(x + at, mask=at < n, other=FILL)


@triton.jit
def load_row(
    x, columns, n, P: tl.constexpr, T: tl.constexpr, FULL: tl.constexpr, FILL: tl.constexpr
):
    """The tiles of a row that is held, as a tuple; empty for one that is walked."""
    tiles = ()
    for t in tl.static_range(T * P):
        tiles = tiles + (load_tile(x, columns, n, t, T * P, FULL, FILL, P),)  # noqa: RUF005
    return tiles


@triton.jit
def _held_part(
    tiles,
    columns,
    n,
    shift,
    p: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    FULL: tl.constexpr,
    TERM: tl.constexpr,
):
    """The lanes that part p of P of each term adds up."""
    total = term(tiles[p], shift, TERM)
    if T == 1 and not FULL:
        there = p * columns.shape[0] + columns < n
        total = tl.where(there, total, 1.0 if TERM == FACTOR else 0.0)
    part = total
    for t in tl.static_range(1, T):
        v = term(tiles[t * P + p], shift, TERM)
        if t == T - 1 and not FULL:
            there = (t * P + p) * columns.shape[0] + columns < n
            v = tl.where(there, v, 1.0 if TERM == FACTOR else 0.0)
        part = v if t % 8 == 0 else combine(part, v, TERM)  # 8 = SEGMENT // LANES
        if t < 8:
            total = part
        elif t % 8 == 7 or t == T - 1:
            total = combine(total, part, TERM)
    return total


@triton.jit
def held_lanes(
    tiles,
    columns,
    n,
    shift,
    P: tl.constexpr,
    T: tl.constexpr,
    FULL: tl.constexpr,
    TERM: tl.constexpr,
):
    """The lanes of a row of T terms of P tiles each, folded to one tile.

    Elements from n on do not count.
    """
    lanes = _held_part(tiles, columns, n, shift, 0, P, T, FULL, TERM)
    if P == 2:
        second = _held_part(tiles, columns, n, shift, 1, P, T, FULL, TERM)
        lanes = combine(lanes, second, TERM)
    elif P == 4:
        third = _held_part(tiles, columns, n, shift, 2, P, T, FULL, TERM)
        lanes = combine(lanes, third, TERM)
        second = _held_part(tiles, columns, n, shift, 1, P, T, FULL, TERM)
        fourth = _held_part(tiles, columns, n, shift, 3, P, T, FULL, TERM)
        lanes = combine(lanes, combine(second, fourth, TERM), TERM)
    return lanes


@triton.jit
def segment_lanes(x, columns, left, shift, WHOLE: tl.constexpr, TERM: tl.constexpr):
    """The lanes [1024] of a segment of which the first `left` elements exist, or WHOLE all."""
    identity = 1.0 if TERM == FACTOR else 0.0
    part = tl.full(columns.shape, identity, tl.float32)
    for t in tl.static_range(_DEPTH):
        at = t * _LANES + columns
        if WHOLE:
            v = term(tl.load(x + at), shift, TERM)
        else:
            v = term(tl.load(x + at, mask=at < left, other=0.0), shift, TERM)
            v = tl.where(at < left, v, identity)
        part = combine(part, v, TERM)
    return part


@triton.jit
def stepped_lanes(x, columns, left, shift, TERM: tl.constexpr):
    """`segment_lanes` one tile after another: little code, for what is rare."""
    identity = 1.0 if TERM == FACTOR else 0.0
    part = tl.full(columns.shape, identity, tl.float32)
    for at in tl.range(0, tl.minimum(left, _SEGMENT), _LANES):
        there = at + columns < left
        v = term(tl.load(x + at + columns, mask=there, other=0.0), shift, TERM)
        part = combine(part, tl.where(there, v, identity), TERM)
    return part


@triton.jit
def _two_segments(x, columns, shift, total, TERM: tl.constexpr):
    """Adds two segments one after another to the lanes `total`; all of both is read first."""
    tiles = ()
    for t in tl.static_range(2 * _DEPTH):
        tiles = tiles + (tl.load(x + t * _LANES + columns),)  # noqa: RUF005
    for first in tl.static_range(0, 2 * _DEPTH, _DEPTH):
        part = tl.full(columns.shape, 1.0 if TERM == FACTOR else 0.0, tl.float32)
        for t in tl.static_range(first, first + _DEPTH):
            part = combine(part, term(tiles[t], shift, TERM), TERM)
        total = combine(total, part, TERM)
    return total


@triton.jit
def walked_lanes(
    x,
    columns,
    n,
    shift,
    UNIT: tl.constexpr,
    TERM: tl.constexpr,
    IN_TWOS: tl.constexpr = False,
):
    """The lanes [1024] of one row of any length that begins at the pointer x.

    One whose length is no multiple of 16 may be short, so all of a segment is read at once.
    IN_TWOS: all of two segments, for more bytes on their way.
    """
    total = tl.full(columns.shape, 1.0 if TERM == FACTOR else 0.0, tl.float32)
    if is_far(TERM):
        for start in tl.range(0, n, _SEGMENT):
            v = stepped_lanes(x + start, columns, n - start, shift, TERM)
            total = combine(total, v, TERM)
    elif IN_TWOS:
        pairs = n // (2 * _SEGMENT) * (2 * _SEGMENT)
        for start in tl.range(0, pairs, 2 * _SEGMENT):
            total = _two_segments(x + start, columns, shift, total, TERM)
        for start in tl.range(pairs, n, _SEGMENT):
            v = segment_lanes(x + start, columns, n - start, shift, False, TERM)
            total = combine(total, v, TERM)
    elif UNIT == 1:
        for start in tl.range(0, n, _SEGMENT):
            v = segment_lanes(x + start, columns, n - start, shift, False, TERM)
            total = combine(total, v, TERM)
    else:
        whole = n // _SEGMENT * _SEGMENT
        stages: tl.constexpr = AHEAD if is_near_term(TERM) else 1
        for start in tl.range(0, whole, _SEGMENT, num_stages=stages):
            v = segment_lanes(x + start, columns, _SEGMENT, shift, True, TERM)
            total = combine(total, v, TERM)
        if whole < n:
            v = stepped_lanes(x + whole, columns, n - whole, shift, TERM)
            total = combine(total, v, TERM)
    return total


@triton.jit
def row_total(
    tiles,
    x,
    columns,
    n,
    shift,
    P: tl.constexpr,
    T: tl.constexpr,
    FULL: tl.constexpr,
    UNIT: tl.constexpr,
    TERM: tl.constexpr,
    IN_TWOS: tl.constexpr = False,
):
    """The total of the terms of a row, held or walked, that begins at the pointer x."""
    if T > 0:
        lanes = held_lanes(tiles, columns, n, shift, P, T, FULL, TERM)
    else:
        lanes = walked_lanes(x, columns, n, shift, UNIT, TERM, IN_TWOS)
    return fold(lanes, TERM)


@triton.jit
def larger(a, b):
    """The larger of two numbers; NaN if there is one."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    """The smaller of two numbers, NaN left out."""
    return tl.minimum(a, b)


@triton.jit
def is_near(top, bottom):
    """Whether no difference from the maximum needs the slow parts of exp: no NaN or infinity."""
    return top - bottom < NEAR


@triton.jit
def _extremes(a_top, a_bottom, b_top, b_bottom):
    return larger(a_top, b_top), smaller(a_bottom, b_bottom)


@triton.jit
def range_of(top, bottom):
    """The largest of the numbers `top` and the smallest of `bottom`."""
    return tl.reduce((top, bottom), 0, _extremes)


@triton.constexpr_function
def _packed(dtype):
    return not knobs.runtime.interpret and dtype.primitive_bitwidth == 16


@triton.constexpr_function
def _in_pairs(operation, dtype):
    return f"{operation}.{dtype.name.replace('fp', 'f')}x2 $0, $1, $2;"


@triton.jit
def wider(top, bottom, v):
    """Ranges made wider by more numbers; 16-bit ones in pairs."""
    if _packed(v.dtype):
        most: tl.constexpr = _in_pairs("max.NaN", v.dtype)
        least: tl.constexpr = _in_pairs("min", v.dtype)
        top = tl.inline_asm_elementwise(most, "=r,r,r", [top, v], v.dtype, True, 2)
        return top, tl.inline_asm_elementwise(least, "=r,r,r", [bottom, v], v.dtype, True, 2)
    else:  # noqa: RET505
        return larger(top, v), smaller(bottom, v)


@triton.jit
def held_range(tiles, columns, n, P: tl.constexpr, T: tl.constexpr, FULL: tl.constexpr):
    """The largest number of a row that is held, NaN if there is one, and the smallest.

    Tiles are filled with -inf.
    """
    top = tiles[0]
    bottom = top
    if T == 1 and not FULL:
        bottom = tl.where(columns < n, bottom, float("inf"))
    for t in tl.static_range(1, T * P):
        v = tiles[t]
        if t >= (T - 1) * P and not FULL:
            top = larger(top, v)
            bottom = smaller(bottom, tl.where(t * columns.shape[0] + columns < n, v, float("inf")))
        else:
            top, bottom = wider(top, bottom, v)
    return range_of(top.to(tl.float32), bottom.to(tl.float32))


@triton.jit
def walked_range(x, n):
    """`held_range` of a row that is walked, from its end to its beginning.

    The sum that comes next begins where this ends, with what is still in the cache.
    """
    columns = tl.arange(0, _LANES)
    top = tl.full((_LANES,), float("-inf"), tl.float32)
    bottom = tl.full((_LANES,), float("inf"), tl.float32)
    whole = n // _SEGMENT * _SEGMENT
    for t in tl.static_range(_DEPTH):
        at = whole + t * _LANES + columns
        v = tl.load(x + at, mask=at < n, other=float("-inf")).to(tl.float32)
        top = larger(top, v)
        bottom = smaller(bottom, tl.where(at < n, v, float("inf")))
    for back in tl.range(_SEGMENT, whole + 1, _SEGMENT, num_stages=AHEAD):
        for t in tl.static_range(_DEPTH):
            v = tl.load(x + (whole - back) + t * _LANES + columns).to(tl.float32)
            top = larger(top, v)
            bottom = smaller(bottom, v)
    return range_of(top, bottom)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """fp32 rounded once to a dtype; every NaN becomes the one quiet NaN of the reference."""
    y = x.to(DTYPE)
    number = x == x
    if tl.float32 == DTYPE:
        bits = tl.where(number, y.to(tl.int32, bitcast=True), 0x7FC00000)
    elif tl.bfloat16 == DTYPE:
        bits = tl.where(number, y.to(tl.int16, bitcast=True), 0x7FC0).to(tl.int16)
    else:
        bits = tl.where(number, y.to(tl.int16, bitcast=True), 0x7E00).to(tl.int16)
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def store_tile(
    to,
    columns,
    n,
    y,
    t: tl.constexpr,
    T: tl.constexpr,
    FULL: tl.constexpr,
    NUMBERS: tl.constexpr,
    P: tl.constexpr = 1,
):
    """Stores fp32 results as tile t of T of a row that begins at the pointer `to`.

    NUMBERS: the caller knows that none is NaN.
    """
    y = y.to(to.dtype.element_ty) if NUMBERS else rounded(y, to.dtype.element_ty)
    at = t * columns.shape[0] + columns
    if FULL or t < T - P:
        tl.store(to + at, y)
    else:
        tl.store(to + at, y, mask=at < n)
