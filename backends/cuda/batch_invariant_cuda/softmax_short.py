"""softmax and log_softmax of 16-bit rows that one program holds in registers, written in Gluon.

The warps of a row meet three times; Triton would let them meet at every halving of the lanes. Where
rows are many, one that comes later goes to the L2 cache. Order as in `rows.py`.
"""

# ruff: noqa: RUF005  (compiled by Triton, which knows less of Python)
from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from batch_invariant_cuda import explog, rows
from batch_invariant_cuda.row_launch import Plan, RowKernel, multiprocessors

_LANES = gl.constexpr(rows.LANES)
_DEPTH = gl.constexpr(rows.SEGMENT // rows.LANES)
_ALL = gl.constexpr(tl.PropagateNan.ALL)
_NEAR = rows.NEAR

_near_div = gluon.jit(explog.near_div.fn)
_log = gluon.jit(explog.log.fn)
_prefetch = gluon.jit(rows.prefetch.fn)
_rounded = gluon.jit(rows.rounded.fn)
_term = gluon.jit(rows.term.fn)
_take_turn = gluon.jit(rows.take_turn.fn)
_wider = gluon.jit(rows.wider.fn)


@gluon.constexpr_function
def _lane_layout(warps):
    return gl.BlockedLayout([1024 // (32 * warps)], [32], [warps], [0])


@gluon.constexpr_function
def _fold_layout(warps):
    return gl.BlockedLayout([16, 2], [1, 32], [1, warps], [1, 0])


@gluon.jit
def _fold(lanes, WARPS: gl.constexpr):
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
def _extremes(a_top, a_bottom, b_top, b_bottom):
    return gl.maximum(a_top, b_top, propagate_nan=_ALL), gl.minimum(a_bottom, b_bottom)


@gluon.jit
def _range(top, bottom, tiles, columns, n, T: gl.constexpr):
    """The largest and smallest of `top`, `bottom` and T tiles to a row's end."""
    for t in gl.static_range(T):
        v = tiles[t]
        if t == T - 1:
            v = gl.where(t * _LANES + columns < n, v, tiles[0])
        top, bottom = _wider(top, bottom, v)
    return gl.reduce((top.to(gl.float32), bottom.to(gl.float32)), 0, _extremes)


@gluon.jit
def _fetch(row, columns, n, T: gl.constexpr):
    """The T tiles of a row; -inf beyond its end."""
    tiles = ()
    for t in gl.static_range(T):
        at = t * _LANES + columns
        if t < T - 1:
            tiles = tiles + (gl.load(row + at),)
        else:
            tiles = tiles + (gl.load(row + at, mask=at < n, other=float("-inf")),)
    return tiles


@gluon.jit
def _row(
    tiles,
    to,
    columns,
    n,
    top,
    LOG: gl.constexpr,
    T: gl.constexpr,
    WARPS: gl.constexpr,
    NEAR: gl.constexpr,
):
    bits: gl.constexpr = to.dtype.element_ty.primitive_bitwidth
    kind: gl.constexpr = rows.exponential(bits, NEAR)
    lanes = gl.zeros([_LANES], gl.float32, _lane_layout(WARPS))
    each = ()
    for first in gl.static_range(0, T, _DEPTH):
        part = gl.zeros([_LANES], gl.float32, _lane_layout(WARPS))
        for t in gl.static_range(first, min(first + _DEPTH, T)):
            e = _term(tiles[t], top, kind)
            if not LOG:
                each = each + (e,)
            if t == T - 1:
                e = gl.where(t * _LANES + columns < n, e, 0.0)
            part += e
        lanes += part
    total = _fold(lanes, WARPS)
    reciprocal = gl.div_rn(1.0, total)
    if LOG:
        total = _log(total)
    for t in gl.static_range(T):
        if LOG:
            y = (tiles[t].to(gl.float32) - top) - total
        elif bits == 16:
            y = each[t] * reciprocal
        else:
            y = _near_div(each[t], total, reciprocal) if NEAR else gl.div_rn(each[t], total)
        y = y.to(to.dtype.element_ty) if NEAR else _rounded(y, to.dtype.element_ty)
        at = t * _LANES + columns
        if t < T - 1:
            gl.store(to + at, y)
        else:
            gl.store(to + at, y, mask=at < n)


@gluon.jit(do_not_specialize=["n_units", "ahead"])
def _softmax_kernel(
    x,
    out,
    n_units,
    ahead,
    LOG: gl.constexpr,
    T: gl.constexpr,
    WARPS: gl.constexpr,
):
    """T tiles in registers; the row that comes `ahead` rows later is sent for."""
    LANE: gl.constexpr = _lane_layout(WARPS)
    _take_turn()
    columns = gl.arange(0, _LANES, LANE)
    n = n_units * 16
    row = gl.program_id(0).to(gl.int64)
    to = out + row * n
    tiles = _fetch(x + row * n, columns, n, T)
    later = row + ahead
    _prefetch(x + later * n, gl.where(later < gl.num_programs(0), n * 2, 0))
    top_each = gl.full([_LANES], float("-inf"), x.dtype.element_ty, LANE)
    bottom_each = gl.full([_LANES], float("inf"), x.dtype.element_ty, LANE)
    top, bottom = _range(top_each, bottom_each, tiles, columns, n, T)
    if top - bottom < _NEAR:
        _row(tiles, to, columns, n, top, LOG, T, WARPS, True)
    else:
        _row(tiles, to, columns, n, top, LOG, T, WARPS, False)


kernel = RowKernel(_softmax_kernel, overlaps=rows.FEW.value, registers={8: 80, 16: 128})


def launch_of(log: bool, x: torch.Tensor, out: torch.Tensor, shape: Plan) -> Any:
    """The kernel and its launch for rows of contiguous x [rows, n]; None for other kernels."""
    if x.element_size() != 2 or not x.is_cuda or shape.unit == 1 or not shape.tiles:
        return None
    count, n = x.shape
    processors = multiprocessors(x.device.index)
    many = shape.warps == 8 and out.element_size() == 2  # not timed for results of 32 bits
    if many or (shape.warps == 16 and count <= processors):
        static = (log, shape.tiles, shape.warps)
        return kernel, (count, (x, out), (n // shape.unit, processors), static, shape.warps)
    return None
