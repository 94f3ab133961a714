// Fixed-width vectors and exact conversions. A 16-lane vector is one AVX-512 register, two AVX2 or
// four NEON ones: the compiler splits it, so that a kernel is written once and its lanes mean the
// same on every CPU.
#pragma once
#include "types.h"

namespace bi {

typedef float f32x16 __attribute__((vector_size(64)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef i32 i32x16 __attribute__((vector_size(64)));
typedef u32 u32x16 __attribute__((vector_size(64)));
typedef i64 i64x8 __attribute__((vector_size(64)));
typedef u64 u64x8 __attribute__((vector_size(64)));
typedef u16 u16x16 __attribute__((vector_size(32)));
typedef _Float16 h16x16 __attribute__((vector_size(32)));

template <class To, class From>
BI_INLINE To bit_cast(const From& from) {
  return __builtin_bit_cast(To, from);
}

// Unaligned loads and stores of any of the vectors above.
template <class V>
BI_INLINE V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}
template <class V>
BI_INLINE void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

template <class V>
BI_INLINE V fma(V a, V b, V c) {
  return __builtin_elementwise_fma(a, b, c);
}
// The same number in all lanes, bit for bit (adding it to a zero vector would turn -0 into +0).
BI_INLINE f32x16 splat(float x) { return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
BI_INLINE f64x8 splat(double x) { return f64x8{x, x, x, x, x, x, x, x}; }

// 16 elements of any storage type as fp32, exactly.
BI_INLINE f32x16 widen(u16x16 h, bf16) {
  return bit_cast<f32x16>(__builtin_convertvector(h, u32x16) << 16);
}
BI_INLINE f32x16 widen(u16x16 h, f16) {
  return __builtin_convertvector(bit_cast<h16x16>(h), f32x16);
}
BI_INLINE f32x16 load_f32(const float* p) { return load<f32x16>(p); }
BI_INLINE f32x16 load_f32(const bf16* p) { return widen(load<u16x16>(p), bf16{}); }
BI_INLINE f32x16 load_f32(const f16* p) { return widen(load<u16x16>(p), f16{}); }

// The first n lanes (0 <= n <= 16); the others are zero and their memory is not touched.
template <class T>
BI_INLINE f32x16 load_f32(const T* p, i64 n) {
  if (n >= 16) return load_f32(p);
  T buffer[16] = {};
  __builtin_memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load_f32(buffer);
}

// Round to nearest even, once; NaN stays NaN (quiet).
BI_INLINE u16x16 narrow(f32x16 x, bf16) {
  u32x16 u = bit_cast<u32x16>(x);
  u32x16 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  u32x16 nan = bit_cast<u32x16>(x != x);
  return __builtin_convertvector((rounded & ~nan) | (((u >> 16) | 0x40u) & nan), u16x16);
}
BI_INLINE u16x16 narrow(f32x16 x, f16) {
  return bit_cast<u16x16>(__builtin_convertvector(x, h16x16));
}
BI_INLINE void store_f32(float* p, f32x16 x) { store(p, x); }
BI_INLINE void store_f32(bf16* p, f32x16 x) { store(p, narrow(x, bf16{})); }
BI_INLINE void store_f32(f16* p, f32x16 x) { store(p, narrow(x, f16{})); }
template <class T>
BI_INLINE void store_f32(T* p, f32x16 x, i64 n) {
  if (n >= 16) return store_f32(p, x);
  T buffer[16];
  store_f32(buffer, x);
  __builtin_memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

BI_INLINE float to_f32(float x) { return x; }
BI_INLINE float to_f32(bf16 x) { return bit_cast<float>(static_cast<u32>(x.bits) << 16); }
BI_INLINE float to_f32(f16 x) { return static_cast<float>(bit_cast<_Float16>(x.bits)); }

}  // namespace bi
