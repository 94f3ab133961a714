// exp, log, log1p and tanh in fp32 whose bits are the same on every device: only IEEE +, -, *, /,
// fma, comparisons and integer operations on the bits, in the order written here, and no libm. Each
// is a template over the vector type, so that a scalar, any width, and a Triton or Pallas copy of the
// same steps agree.
//
// How the polynomials were made: Remez exchange in 50 digits (mpmath) for the least relative error
// of the whole function on the reduced interval, coefficients rounded to fp32, then moved by single
// ulps as long as the largest error on a grid of 4000 points fell. Errors of polynomials are given
// in units of 2^-24, relative. tests/test_native_math.py repeats the steps in float64 torch.
#pragma once
#include "simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace bi {

// The integer vector with as many lanes as V.
template <class V>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = i32;
};
template <>
struct IntegerOf<f32x16> {
  using type = i32x16;
};
template <class V>
using Integer = typename IntegerOf<V>::type;

constexpr float INFINITY_F32 = __builtin_inff();
constexpr float NAN_F32 = __builtin_nanf("");  // 0x7fc00000: the one NaN that kernels write

// x * 2^n, rounded once, for |x| in [1/2, 2] and whole n in [-151, 129].
template <class V>
BI_INLINE V scale_by_power(V x, V n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64)
    return bit_cast<V>(_mm512_scalef_ps(bit_cast<__m512>(x), bit_cast<__m512>(n)));
#endif
  // Two exact-or-final steps: the first product is a normal number, so only the second one rounds.
  Integer<V> whole = bit_cast<Integer<V>>(n + 12582912.0f) - 0x4b400000;
  Integer<V> half = whole >> 1;
  V first = bit_cast<V>((half + 127) << 23);
  V second = bit_cast<V>((whole - half + 127) << 23);
  return x * first * second;
}

// e^x. Largest error over all 2^32 inputs: 0.877 ulp, denormal results included. exp(+-0) = 1,
// exp(-inf) = 0, exp(inf) = inf, NaN gives NaN.
//  - x is clamped to [-104, 89], beyond which the result is 0 or inf;
//  - n = the whole number nearest to x log2(e), by adding and subtracting 1.5 * 2^23;
//  - r = high + low = x - n ln(2): high = fma(-n, 0x1.62e430p-1, x), low = n * 0x1.05c610p-29;
//  - e^r = 1 + (high + (low + r^2 q(r))), q of degree 4 by Horner in FMAs (error 0.053);
//  - e^x = e^r 2^n, rounded once.
template <class V>
BI_INLINE V exp(V x) {
  constexpr V zero = {};
  constexpr float TO_WHOLE = 12582912.0f;   // 1.5 * 2^23: one ulp here is 1
  x = x > zero + 89.0f ? zero + 89.0f : x;  // comparisons written so that NaN passes
  x = x < zero - 104.0f ? zero - 104.0f : x;
  V n = fma(x, zero + 0x1.715476p+0f, zero + TO_WHOLE) - TO_WHOLE;
  V high = fma(n, zero - 0x1.62e430p-1f, x);
  V low = n * 0x1.05c610p-29f;
  V r = high + low;
  V q = fma(r, zero + 0x1.6a241ap-10f, zero + 0x1.1239ccp-7f);
  q = fma(q, r, zero + 0x1.5558d2p-5f);
  q = fma(q, r, zero + 0x1.555492p-3f);
  q = fma(q, r, zero + 0x1.fffffcp-2f);
  return scale_by_power(high + fma(r * r, q, low) + 1.0f, n);
}

// e^x for x <= 0 in fewer steps, for results that are rounded to 16 bits in the end. Largest error
// over all x in [-87, 0]: below 4.1e-6 of the result. short_exp(0) = 1, NaN gives NaN.
//  - x is clamped to -104, below which the result is 0; n as in exp;
//  - f = fma(x, log2(e), -n), which the error of that constant moves by 2e-8 |x|;
//  - 2^f = 1 + f q(f), q of degree 3 by Horner in FMAs (error 48);
//  - e^x = 2^f 2^n, rounded once.
template <class V>
BI_INLINE V short_exp(V x) {
  constexpr V zero = {};
  constexpr float TO_WHOLE = 12582912.0f;
  x = x < zero - 104.0f ? zero - 104.0f : x;
  V n = fma(x, zero + 0x1.715476p+0f, zero + TO_WHOLE) - TO_WHOLE;
  V f = fma(x, zero + 0x1.715476p+0f, -n);
  V q = fma(f, zero + 0x1.3a02c0p-7f, zero + 0x1.c9fc80p-5f);
  q = fma(q, f, zero + 0x1.ec0376p-3f);
  q = fma(q, f, zero + 0x1.62e12cp-1f);
  return scale_by_power(fma(q, f, zero + 1.0f), n);
}

// k ln(2) + log(1 + f), for whole k and 1 + f in [sqrt(1/2), sqrt(2)):
//  - log(1 + f) = f + f^2 (-1/2 + f q(f)), q of degree 7 by Horner in FMAs (error 0.10);
//  - the sum is k * 0x1.62e4p-1 + (f + (k * 0x1.7f7d1cp-20 + f^2 (...))), each an FMA or rounded.
template <class V>
BI_INLINE V log_sum(V k, V f) {
  constexpr V zero = {};
  V q = fma(f, zero - 0x1.38b512p-4f, zero + 0x1.0565aep-3f);
  q = fma(q, f, zero - 0x1.0d8a60p-3f);
  q = fma(q, f, zero + 0x1.22d95cp-3f);
  q = fma(q, f, zero - 0x1.5471cep-3f);
  q = fma(q, f, zero + 0x1.99a010p-3f);
  q = fma(q, f, zero - 0x1.000228p-2f);
  q = fma(q, f, zero + 0x1.555554p-2f);
  V rest = f * f * fma(q, f, zero - 0.5f);
  return fma(k, zero + 0x1.62e4p-1f, f + fma(k, zero + 0x1.7f7d1cp-20f, rest));
}

// x = 2^k (1 + f) for a normal number x > 0, the bits of 1 + f being at least 0x3f3504f3 (sqrt(1/2))
// and below twice that.
template <class V>
struct Reduced {
  V k, f;
};
template <class V>
BI_INLINE Reduced<V> reduce_log(V x) {
  using I = Integer<V>;
  I bits = bit_cast<I>(x);
  I exponent = (bits - 0x3f3504f3) >> 23;
  V f = bit_cast<V>(bits - (exponent << 23)) - 1.0f;
  if constexpr (sizeof(V) == sizeof(float)) {
    return {static_cast<float>(exponent), f};
  } else {
    return {__builtin_convertvector(exponent, V), f};
  }
}

// Natural logarithm. Largest error over all 2^32 inputs: 0.923 ulp, denormal inputs included.
// log(1) = +0, log(+-0) = -inf, log(inf) = inf, a negative number or NaN gives NaN. A denormal x is
// multiplied by 2^23, and 23 is taken off k.
template <class V>
BI_INLINE V log(V x) {
  constexpr V zero = {};
  constexpr V infinity = zero + INFINITY_F32;
  auto tiny = x < zero + 0x1p-126f;
  auto [k, f] = reduce_log(tiny ? x * 0x1p23f : x);
  V result = log_sum(tiny ? k - 23.0f : k, f);
  result = x == infinity ? infinity : result;
  result = x == zero ? -infinity : result;
  return x >= zero ? result : zero + NAN_F32;
}

// tanh x. Largest error in tests/test_native_math.py: below 1.7 ulp. tanh(+-0) = +-0,
// tanh(+-inf) = +-1, NaN gives NaN.
//  - |x| <= 5/8: x + x x^2 q(x^2), q of degree 4 by Horner in FMAs (error 0.074);
//  - beyond: 1 - 2 / (e^(2|x|) + 1), with the sign of x.
template <class V>
BI_INLINE V tanh(V x) {
  using I = Integer<V>;
  constexpr V zero = {};
  I sign = bit_cast<I>(x) & static_cast<i32>(0x80000000u);
  V size = bit_cast<V>(bit_cast<I>(x) & 0x7fffffff);
  V square = x * x;
  V q = fma(square, zero - 0x1.75e1c4p-8f, zero + 0x1.52269ap-6f);
  q = fma(q, square, zero - 0x1.b83c5ap-5f);
  q = fma(q, square, zero + 0x1.110726p-3f);
  q = fma(q, square, zero - 0x1.555532p-2f);
  V near = fma(x * square, q, x);
  V far = 1.0f - (zero + 2.0f) / (exp(size + size) + 1.0f);
  return bit_cast<V>(bit_cast<I>(size <= zero + 0.625f ? near : far) | sign);
}

// -log(1 - v) for v in [2^-32, 1 - 2^-24]. 1 - v is rounded, but where its exponent is that of 1 the
// polynomial is given -v itself: a small v keeps all of its digits.
template <class V>
BI_INLINE V minus_log1m(V v) {
  auto [k, f] = reduce_log(1.0f - v);
  return -log_sum(k, k == 0.0f ? -v : f);
}

}  // namespace bi
