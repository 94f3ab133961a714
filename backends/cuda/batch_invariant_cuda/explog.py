"""exp, log and log1p in fp32 by the very steps of the CPU reference: IEEE +, -, *, fma, bits.

The vendor's exp and log have other bits on every device. These are the steps of
`batch_invariant/cpu/native/math.h`, which also gives their errors and how the polynomials were
made. Kernels that call them are compiled with `enable_fp_fusion=False`: every fma is written out.
"""

from __future__ import annotations

import triton
import triton.language as tl

_TO_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23: one ulp here is 1
_LOG2_E = tl.constexpr(float.fromhex("0x1.715476p+0"))
_LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e430p-1"))
_LN2_LOW = tl.constexpr(float.fromhex("0x1.05c610p-29"))
_E0 = tl.constexpr(float.fromhex("0x1.6a241ap-10"))
_E1 = tl.constexpr(float.fromhex("0x1.1239ccp-7"))
_E2 = tl.constexpr(float.fromhex("0x1.5558d2p-5"))
_E3 = tl.constexpr(float.fromhex("0x1.555492p-3"))
_E4 = tl.constexpr(float.fromhex("0x1.fffffcp-2"))
_S0 = tl.constexpr(float.fromhex("0x1.3a02c0p-7"))
_S1 = tl.constexpr(float.fromhex("0x1.c9fc80p-5"))
_S2 = tl.constexpr(float.fromhex("0x1.ec0376p-3"))
_S3 = tl.constexpr(float.fromhex("0x1.62e12cp-1"))

_TINY = tl.constexpr(2.0**-60)
_LARGER = tl.constexpr(2.0**64)
_MIDDLE = tl.constexpr(2.0**-86)  # half of the smallest denormal number, made larger

_LOG_LN2_HIGH = tl.constexpr(float.fromhex("0x1.62e4p-1"))
_LOG_LN2_LOW = tl.constexpr(float.fromhex("0x1.7f7d1cp-20"))
_L0 = tl.constexpr(float.fromhex("-0x1.38b512p-4"))
_L1 = tl.constexpr(float.fromhex("0x1.0565aep-3"))
_L2 = tl.constexpr(float.fromhex("-0x1.0d8a60p-3"))
_L3 = tl.constexpr(float.fromhex("0x1.22d95cp-3"))
_L4 = tl.constexpr(float.fromhex("-0x1.5471cep-3"))
_L5 = tl.constexpr(float.fromhex("0x1.99a010p-3"))
_L6 = tl.constexpr(float.fromhex("-0x1.000228p-2"))
_L7 = tl.constexpr(float.fromhex("0x1.555554p-2"))


@triton.jit
def _scaled(y, shifted):
    """y * 2^n for y in [1/2, 2], where shifted = 1.5 * 2^23 + n.

    In two steps: the first product is a normal number, so only the second one rounds.
    """
    whole = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = whole >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((whole - half + 127) << 23).to(tl.float32, bitcast=True)
    return y * first * second


@triton.jit
def _near_scaled(y, shifted):
    """`_scaled` where the result is a normal number: an addition to the exponent.

    The bits of 1.5 * 2^23 shifted left by 23 are all zero, so only n is left of the shifted sum.
    """
    power = shifted.to(tl.int32, bitcast=True) << 23
    return (y.to(tl.int32, bitcast=True) + power).to(tl.float32, bitcast=True)


@triton.jit
def exp(x, NEVER_POSITIVE: tl.constexpr):
    """e^x in fp32; with NEVER_POSITIVE the caller knows that no x is above 0 (NaN is fine)."""
    if not NEVER_POSITIVE:
        x = tl.where(x > 89.0, 89.0, x)  # comparisons written so that NaN passes
    x = tl.where(x < -104.0, -104.0, x)
    shifted = tl.fma(x, _LOG2_E, _TO_WHOLE)
    n = shifted - _TO_WHOLE
    high = tl.fma(n, -_LN2_HIGH, x)
    low = n * _LN2_LOW
    r = high + low
    q = tl.fma(r, _E0, _E1)
    q = tl.fma(q, r, _E2)
    q = tl.fma(q, r, _E3)
    q = tl.fma(q, r, _E4)
    return _scaled(high + tl.fma(r * r, q, low) + 1.0, shifted)


@triton.jit
def near_exp(x):
    """The bits of `exp` for x in [-80, 0], where neither clamps nor a denormal result occur."""
    shifted = tl.fma(x, _LOG2_E, _TO_WHOLE)
    n = shifted - _TO_WHOLE
    high = tl.fma(n, -_LN2_HIGH, x)
    low = n * _LN2_LOW
    r = high + low
    q = tl.fma(r, _E0, _E1)
    q = tl.fma(q, r, _E2)
    q = tl.fma(q, r, _E3)
    q = tl.fma(q, r, _E4)
    return _near_scaled(high + tl.fma(r * r, q, low) + 1.0, shifted)


@triton.jit
def short_exp(x):
    """e^x in fewer steps for x that is not above 0 (NaN is fine), for results of 16 bits."""
    x = tl.where(x < -104.0, -104.0, x)
    shifted = tl.fma(x, _LOG2_E, _TO_WHOLE)
    return _scaled(_short_power(x, shifted), shifted)


@triton.jit
def near_short_exp(x):
    """The bits of `short_exp` for x in [-80, 0]."""
    shifted = tl.fma(x, _LOG2_E, _TO_WHOLE)
    return _near_scaled(_short_power(x, shifted), shifted)


@triton.jit
def _short_power(x, shifted):
    f = tl.fma(x, _LOG2_E, _TO_WHOLE - shifted)
    q = tl.fma(f, _S0, _S1)
    q = tl.fma(q, f, _S2)
    q = tl.fma(q, f, _S3)
    return tl.fma(q, f, 1.0)


@triton.jit
def near_div(x, divisor, reciprocal):
    """The bits of `div_rn(x, divisor)` for x and quotient well inside the normal numbers.

    reciprocal: 1 / divisor, correctly rounded. The first quotient is within 1.5 ulp; so what the
    second line rounds is within 2^-46 of the quotient, both numbers taken in [1, 2). Quotients
    that close to the middle of two fp32 numbers are few, and `tests/test_division.py` tries all.

    Source: Markstein, Computation of elementary functions on the IBM RISC System/6000, 1990.
    """
    q = x * reciprocal
    return tl.fma(tl.fma(-q, divisor, x), reciprocal, q)


@triton.jit
def share_div(x, divisor, reciprocal):
    """The bits of `div_rn(x, divisor)` for x in [0, 1] or NaN and a divisor in [1, 2^30].

    Where quotients are tiny, `div_rn` takes a long way. Here a tiny x is made larger by 2^64. When
    the quotient is made smaller again it can be denormal, and is then rounded a second time: where
    it was in the middle of two numbers, what the first rounding has left tells which one is next.
    """
    tiny = x < _TINY
    x = tl.where(tiny, x * _LARGER, x)
    q = near_div(x, divisor, reciprocal)
    left = tl.fma(-q, divisor, x)
    y = q * (1 / _LARGER)
    off = q - y * _LARGER
    up = (off == _MIDDLE) & (left > 0.0)
    down = (off == -_MIDDLE) & (left < 0.0)
    bits = y.to(tl.int32, bitcast=True) + up.to(tl.int32) - down.to(tl.int32)
    return tl.where(tiny, bits.to(tl.float32, bitcast=True), q)


@triton.jit
def log_sum(k, f):
    """k ln(2) + log(1 + f), for whole k and 1 + f in [sqrt(1/2), sqrt(2))."""
    q = tl.fma(f, _L0, _L1)
    q = tl.fma(q, f, _L2)
    q = tl.fma(q, f, _L3)
    q = tl.fma(q, f, _L4)
    q = tl.fma(q, f, _L5)
    q = tl.fma(q, f, _L6)
    q = tl.fma(q, f, _L7)
    rest = f * f * tl.fma(q, f, -0.5)
    return tl.fma(k, _LOG_LN2_HIGH, f + tl.fma(k, _LOG_LN2_LOW, rest))


@triton.jit
def reduce_log(x):
    """k and f of a normal number x = 2^k (1 + f), as `log_sum` takes them."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    return exponent.to(tl.float32), f


@triton.jit
def log(x):
    """The natural logarithm in fp32; a negative number or NaN gives NaN, zeros give -inf."""
    tiny = x < 1.1754943508222875e-38
    k, f = reduce_log(tl.where(tiny, x * 8388608.0, x))
    result = log_sum(tl.where(tiny, k - 23.0, k), f)
    result = tl.where(x == float("inf"), float("inf"), result)
    result = tl.where(x == 0.0, float("-inf"), result)
    return tl.where(x >= 0.0, result, float("nan"))


@triton.jit
def minus_log1m(v):
    """-log(1 - v) for v in [2^-32, 1 - 2^-24]; a small v keeps all of its digits."""
    k, f = reduce_log(1.0 - v)
    return -log_sum(k, tl.where(k == 0.0, -v, f))
