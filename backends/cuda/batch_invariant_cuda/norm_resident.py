"""rms_norm of long 16-bit rows that one program holds, written in Gluon.

Each element is read once: see `resident.py`. While a row's results are made, the next row takes
their place, and its squares are added up some segments behind.
"""

# ruff: noqa: RUF005  (compiled by Triton, which knows less of Python)
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from batch_invariant_cuda import reduce_ops, rows
from batch_invariant_cuda.resident import (
    DEPTH,
    LANES,
    SEGMENT,
    fetch,
    fetch_rest,
    fold,
    lane_layout,
    rounded_pairs,
    segment_tiles,
    take_turn,
)
from batch_invariant_cuda.row_launch import RowKernel

_RSTD = reduce_ops.RSTD
_BEHIND = gl.constexpr(3)  # segments on their way while another is added up
WARPS = 8  # of many registers: twice as many warps took 5 % longer

_finished = gluon.jit(reduce_ops.finished.fn)


@gluon.jit
def _weights(weight, s, columns, n, GIVEN: gl.constexpr, WHOLE: gl.constexpr):
    """Segment s of the weight as a tuple of tiles; zeros beyond its end."""
    found = ()
    if GIVEN:
        for t in gl.static_range(DEPTH):
            at = s * SEGMENT + t * LANES + columns
            if WHOLE:
                found = found + (gl.load(weight + at),)
            else:
                found = found + (gl.load(weight + at, mask=at < n, other=0.0),)
    return found


@gluon.jit
def _squares(tiles, first: gl.constexpr, T: gl.constexpr):
    """The lanes of the segment that begins with tile `first` of T."""
    v = tiles[first].to(gl.float32)
    part = v * v
    for t in gl.static_range(first + 1, min(first + DEPTH, T)):
        v = tiles[t].to(gl.float32)
        part += v * v
    return part


@gluon.jit
def _results(
    tiles,
    first: gl.constexpr,
    T: gl.constexpr,
    whole: gl.constexpr,
    weights,
    rstd,
    out,
    columns,
    n,
    start,
    WEIGHT: gl.constexpr,
):
    """Stores the results of the segment that begins with tile `first` of T, `whole` of them full.

    start: where the segment begins in the row.
    """
    for t in gl.static_range(first, min(first + DEPTH, T)):
        y = tiles[t].to(gl.float32) * rstd
        if WEIGHT:
            y = y * weights[t - first].to(gl.float32)
        y = rounded_pairs(y, out)
        at = start + (t - first) * LANES + columns
        if t < whole:
            gl.store(out + at, y)
        else:
            gl.store(out + at, y, mask=at < n)


@gluon.jit(do_not_specialize=["n_units", "count", "size", "eps"])
def _rms_norm_kernel(
    x,
    residual,
    weight,
    bias,
    out,
    total_out,
    mean_out,
    rstd_out,
    n_units,
    count,
    size,
    eps,
    WEIGHT: gl.constexpr,
    S: gl.constexpr,
    T: gl.constexpr,
    WARPS: gl.constexpr,
):
    """S segments of a row in shared memory, T tiles in registers.

    The tensors are those of `norm_kernels`; only x, weight and out are used.
    """
    LANE: gl.constexpr = lane_layout(WARPS)
    GROUPS: gl.constexpr = (T + DEPTH - 1) // DEPTH
    FULL: gl.constexpr = T > DEPTH  # the first segment behind the slots
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    slots = gl.allocate_shared_memory(x.dtype.element_ty, [S, SEGMENT], shared)
    held = slots._reinterpret(x.dtype.element_ty, [S * DEPTH, LANES], shared)
    take_turn()
    columns = gl.arange(0, LANES, LANE)
    n = n_units * 16
    row = gl.program_id(0)
    at = row.to(gl.int64) * n
    for s in range(S):
        fetch(x + at, True, slots, s, WARPS)
    rest = fetch_rest(x + at, columns, n, S, T, 0, T, 0.0)
    lanes = gl.zeros([LANES], gl.float32, LANE)
    async_copy.wait_group(0)
    for s in range(S):
        lanes += _squares(segment_tiles(held, s, LANE), 0, DEPTH)
    for g in gl.static_range(GROUPS):
        lanes += _squares(rest, g * DEPTH, T)
    while row < count:
        to = out + at
        following = row + gl.num_programs(0)
        at = gl.minimum(following, count - 1).to(gl.int64) * n
        weights = _weights(weight, 0, columns, n, WEIGHT, True)
        total = fold(lanes, WARPS)
        rstd = _finished(total, total, size, eps, _RSTD)
        lanes = gl.zeros([LANES], gl.float32, LANE)
        for s in range(S):
            tiles = segment_tiles(held, s, LANE)
            start = s * SEGMENT
            later = _weights(weight, s + 1, columns, n, WEIGHT, FULL)
            _results(tiles, 0, DEPTH, DEPTH, weights, rstd, to, columns, n, start, WEIGHT)
            weights = later
            fetch(x + at, following < count, slots, s, WARPS)
            if s >= _BEHIND:
                async_copy.wait_group(_BEHIND)
                lanes += _squares(segment_tiles(held, s - _BEHIND, LANE), 0, DEPTH)
        coming = ()
        for g in gl.static_range(GROUPS):
            start = (S + g) * SEGMENT
            later = weights
            if g + 1 < GROUPS:
                later = _weights(weight, S + g + 1, columns, n, WEIGHT, (g + 2) * DEPTH < T)
            _results(rest, g * DEPTH, T, T - 1, weights, rstd, to, columns, n, start, WEIGHT)
            weights = later
            coming = coming + fetch_rest(
                x + at, columns, n, S, T, g * DEPTH, min((g + 1) * DEPTH, T), 0.0
            )
        rest = coming
        for late in gl.static_range(S - _BEHIND, S):
            async_copy.wait_group(S - 1 - late)
            lanes += _squares(segment_tiles(held, late, LANE), 0, DEPTH)
        for g in gl.static_range(GROUPS):
            lanes += _squares(rest, g * DEPTH, T)
        row = following
    async_copy.wait_group(0)


resident = RowKernel(_rms_norm_kernel, overlaps=rows.FEW.value, registers={WARPS: 255})
