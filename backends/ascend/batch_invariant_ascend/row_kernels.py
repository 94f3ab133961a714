"""Row operators for triton-ascend, in the order of `batch_invariant.ops.row_order`.

Lane i of 1024 adds elements i, i + 1024, ... of a segment of 8192 one after another; the segments'
lanes are added ascending; lanes are folded by halves. A fold adds two elements, so no compiler can
choose an order for it. Each program walks rows of its own, one at a time, so a row is computed
alike wherever it stands and however many there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LANES = 1024
SEGMENT = 8192
_LANES = tl.constexpr(LANES)
_SEGMENT = tl.constexpr(SEGMENT)
_DEPTH = tl.constexpr(SEGMENT // LANES)
_PROGRAMS = 40
"""As many as an Atlas A2 or A3 has vector cores; no bit depends on it."""

_TO_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23: one ulp here is 1
_LOG2_E = tl.constexpr(float.fromhex("0x1.715476p+0"))
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440e-4)
_E0 = tl.constexpr(float.fromhex("0x1.6a241ap-10"))
_E1 = tl.constexpr(float.fromhex("0x1.1239ccp-7"))
_E2 = tl.constexpr(float.fromhex("0x1.5558d2p-5"))
_E3 = tl.constexpr(float.fromhex("0x1.555492p-3"))
_E4 = tl.constexpr(float.fromhex("0x1.fffffcp-2"))

VALUE = tl.constexpr(0)
SQUARE = tl.constexpr(1)
EXPONENTIAL = tl.constexpr(2)


@triton.jit
def _exp(x):
    """e^x in fp32 for x <= 0, by the steps of explog.py; NaN stays NaN."""
    bounded = tl.where(x < -104.0, -104.0, x)
    shifted = bounded * _LOG2_E + _TO_WHOLE
    k = shifted - _TO_WHOLE
    r = (bounded - k * _LN2_HIGH) - k * _LN2_LOW
    q = _E0 * r + _E1
    q = q * r + _E2
    q = q * r + _E3
    q = q * r + _E4
    y = (r * r * q + r) + 1.0
    whole = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = whole >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((whole - half + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x == x, y * first * second, x)


@triton.jit
def _total(x, n, shift, TERM: tl.constexpr):
    """The total of the terms of one row of n elements that begins at the pointer x."""
    columns = tl.arange(0, _LANES)
    lanes = tl.zeros((_LANES,), tl.float32)
    for begin in range(0, n, _SEGMENT):
        part = tl.zeros((_LANES,), tl.float32)
        for t in range(_DEPTH):
            at = begin + t * _LANES + columns
            v = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
            if TERM == SQUARE:
                v = v * v
            if TERM == EXPONENTIAL:
                v = _exp(v - shift)
            part += tl.where(at < n, v, 0.0)
        lanes += part
    half = tl.sum(tl.reshape(lanes, (2, 512)), 0)
    half = tl.sum(tl.reshape(half, (2, 256)), 0)
    half = tl.sum(tl.reshape(half, (2, 128)), 0)
    half = tl.sum(tl.reshape(half, (2, 64)), 0)
    half = tl.sum(tl.reshape(half, (2, 32)), 0)
    half = tl.sum(tl.reshape(half, (2, 16)), 0)
    half = tl.sum(tl.reshape(half, (2, 8)), 0)
    half = tl.sum(tl.reshape(half, (2, 4)), 0)
    half = tl.sum(tl.reshape(half, (2, 2)), 0)
    return tl.sum(half, 0)


@triton.jit
def row_sum_kernel(x, out, rows, n):
    """out[rows] = the sums of fp32 x[rows, n]."""
    first, programs = tl.program_id(0), tl.num_programs(0)
    for i in range(0, tl.cdiv(rows - first, programs)):
        row = first.to(tl.int64) + i * programs
        tl.store(out + row, _total(x + row * n, n, 0.0, VALUE))


@triton.jit
def rms_norm_kernel(x, weight, out, rstd, rows, n, eps, WEIGHTED: tl.constexpr):
    """out[rows, n] = x / sqrt(mean(x^2) + eps) * weight in fp32, and rstd[rows]."""
    columns = tl.arange(0, _LANES)
    first, programs = tl.program_id(0), tl.num_programs(0)
    for i in range(0, tl.cdiv(rows - first, programs)):
        row = first.to(tl.int64) + i * programs
        here = row * n
        r = 1.0 / tl.sqrt(_total(x + here, n, 0.0, SQUARE) / n + eps)
        tl.store(rstd + row, r)
        for begin in range(0, n, _LANES):
            at = begin + columns
            y = tl.load(x + here + at, mask=at < n, other=0.0) * r
            if WEIGHTED:
                y = y * tl.load(weight + at, mask=at < n, other=0.0)
            tl.store(out + here + at, y, mask=at < n)


@triton.jit
def softmax_kernel(x, out, rows, n):
    """out[rows, n] = exp(x - max(x)) / sum(exp(x - max(x))) in fp32."""
    columns = tl.arange(0, _LANES)
    first, programs = tl.program_id(0), tl.num_programs(0)
    for i in range(0, tl.cdiv(rows - first, programs)):
        row = first.to(tl.int64) + i * programs
        here = row * n
        largest = tl.full((_LANES,), float("-inf"), tl.float32)
        for begin in range(0, n, _LANES):
            at = begin + columns
            # A NaN may be lost here: it makes the denominator NaN, and so the whole row.
            largest = tl.maximum(largest, tl.load(x + here + at, mask=at < n, other=float("-inf")))
        top = tl.max(largest, 0)
        total = _total(x + here, n, top, EXPONENTIAL)
        for begin in range(0, n, _LANES):
            at = begin + columns
            v = tl.load(x + here + at, mask=at < n, other=0.0)
            tl.store(out + here + at, _exp(v - top) / total, mask=at < n)


def _grid(x: torch.Tensor) -> tuple[int]:
    return (min(x.size(0), _PROGRAMS),)


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """The sums of contiguous fp32 [rows, n]."""
    out = torch.empty(x.size(0), dtype=torch.float32, device=x.device)
    row_sum_kernel[_grid(x)](x, out, *x.shape)
    return out.masked_fill(out.isnan(), torch.nan)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of contiguous fp32 [rows, n] and rstd [rows]; weight fp32 [n] or None."""
    out = torch.empty_like(x)
    rstd = torch.empty(x.size(0), dtype=torch.float32, device=x.device)
    given = weight is not None
    rms_norm_kernel[_grid(x)](x, weight if given else x, out, rstd, *x.shape, eps, WEIGHTED=given)
    return out, rstd


def softmax(x: torch.Tensor) -> torch.Tensor:
    """The softmax of the rows of contiguous fp32 [rows, n]."""
    out = torch.empty_like(x)
    softmax_kernel[_grid(x)](x, out, *x.shape)
    return out
