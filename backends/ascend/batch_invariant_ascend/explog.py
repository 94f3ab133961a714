"""exp and log in fp32, composed of elementwise additions, multiplications and bit operations.

A vendor's exp may use other instructions for the end of a tensor than for its body, and other ones
on every chip. Every step here is one rounded operation, so an element's bits depend on its value
alone. The polynomials are those of the CPU reference; its steps are fused multiply-adds, so the
bits are not the same as there.
"""

from __future__ import annotations

import math

import torch

_LOG2_E = float.fromhex("0x1.715476p+0")
_LN2_HIGH = 0.693359375  # few bits: a whole multiple of it is exact
_LN2_LOW = -2.12194440e-4
_EXP = ("0x1.6a241ap-10", "0x1.1239ccp-7", "0x1.5558d2p-5", "0x1.555492p-3", "0x1.fffffcp-2")
_LOG = (
    *("-0x1.38b512p-4", "0x1.0565aep-3", "-0x1.0d8a60p-3", "0x1.22d95cp-3"),
    *("-0x1.5471cep-3", "0x1.99a010p-3", "-0x1.000228p-2", "0x1.555554p-2", "-0x1p-1"),
)
_SMALLEST_NORMAL = 2.0**-126


def exp(x: torch.Tensor) -> torch.Tensor:
    """e to the power of every element of an fp32 tensor; NaN stays NaN."""
    bounded = x.clamp(-104.0, 89.0)
    k = (bounded * _LOG2_E).round()
    r = (bounded - k * _LN2_HIGH) - k * _LN2_LOW
    q = _horner(_EXP, r)
    y = (r * r * q + r) + 1.0
    half = (k * 0.5).floor()  # 2^k alone may be out of range where the result is not
    y = y * _power_of_two(half) * _power_of_two(k - half)
    y = y.masked_fill(x > 89.0, math.inf)
    return torch.where(x == x, y, x)


def log(x: torch.Tensor) -> torch.Tensor:
    """The natural logarithm of every element of an fp32 tensor; negative numbers give NaN."""
    tiny = x < _SMALLEST_NORMAL
    bits = torch.where(tiny, x * 2.0**23, x).view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    k = exponent.float()
    k = torch.where(tiny, k - 23.0, k)
    y = k * _LN2_HIGH + (f + (f * f * _horner(_LOG, f) + k * _LN2_LOW))
    y = torch.where(x == math.inf, x, y)
    y = y.masked_fill(x == 0, -math.inf)
    return y.masked_fill(~(x >= 0), math.nan)


def _horner(coefficients: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
    q = torch.full_like(x, float.fromhex(coefficients[0]))
    for coefficient in coefficients[1:]:
        q = q * x + float.fromhex(coefficient)
    return q


def _power_of_two(k: torch.Tensor) -> torch.Tensor:
    """2^k for whole numbers of normal range, by their bits; anything for NaN."""
    return ((k.nan_to_num(0.0).to(torch.int32) + 127) << 23).view(torch.float32)
