// Loads and stores of the first `count` (1..16) of 16 elements; memory after them is not touched.
// Rows end anywhere, so these sit in every kernel: no call, no loop over elements.
#pragma once
#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bi {

#if defined(__AVX512F__)
// The asm hides the value: clang 22 turns a 16-bit masked store of narrowed 32-bit lanes, whose
// mask is known to be 1, into a 4-byte store that overwrites the neighbour.
BI_INLINE u32 lane_mask(i64 count) {
  u32 mask = (1u << count) - 1u;
  __asm__("" : "+r"(mask));
  return mask;
}
BI_INLINE f32x16 load_few(const float* p, i64 count) {
  return bit_cast<f32x16>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(lane_mask(count)), p));
}
template <class T>
BI_INLINE f32x16 load_few(const T* p, i64 count) {
  return widen(
      bit_cast<u16x16>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(lane_mask(count)), p)), T{});
}
BI_INLINE void store_few(float* p, f32x16 x, i64 count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(lane_mask(count)), bit_cast<__m512>(x));
}
template <class T>
BI_INLINE void store_few(T* p, f32x16 x, i64 count) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(lane_mask(count)),
                           bit_cast<__m256i>(narrow(x, T{})));
}
#else
// Copies count (0..15) elements in pieces of 8, 4, 2 and 1. Not inlined: it would be most of the
// library.
template <class T>
__attribute__((noinline)) void copy_few(T* to, const T* from, i64 count) {
  i64 done = 0;
  if (count & 8) __builtin_memcpy(to, from, 8 * sizeof(T)), done = 8;
  if (count & 4) __builtin_memcpy(to + done, from + done, 4 * sizeof(T)), done += 4;
  if (count & 2) __builtin_memcpy(to + done, from + done, 2 * sizeof(T)), done += 2;
  if (count & 1) to[done] = from[done];
}
#if defined(__AVX2__)
struct LaneMasks {
  __m256i low, high;
};
BI_INLINE LaneMasks lane_masks(i64 count) {
  __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i limit = _mm256_set1_epi32(static_cast<i32>(count));
  return {_mm256_cmpgt_epi32(limit, index),
          _mm256_cmpgt_epi32(_mm256_sub_epi32(limit, _mm256_set1_epi32(8)), index)};
}
BI_INLINE f32x16 load_few(const float* p, i64 count) {
  struct {
    __m256 low, high;
  } v;
  LaneMasks masks = lane_masks(count);
  v.low = _mm256_maskload_ps(p, masks.low);
  v.high = _mm256_maskload_ps(p + 8, masks.high);
  return bit_cast<f32x16>(v);
}
BI_INLINE void store_few(float* p, f32x16 x, i64 count) {
  struct Halves {
    __m256 low, high;
  } v = bit_cast<Halves>(x);
  LaneMasks masks = lane_masks(count);
  _mm256_maskstore_ps(p, masks.low, v.low);
  _mm256_maskstore_ps(p + 8, masks.high, v.high);
}
#endif
template <class T>
BI_INLINE f32x16 load_few(const T* p, i64 count) {
  T buffer[16] = {};
  copy_few(buffer, p, count);
  return load_f32(buffer);
}
template <class T>
BI_INLINE void store_few(T* p, f32x16 x, i64 count) {
  T buffer[16];
  store_f32(buffer, x);
  copy_few(p, buffer, count);
}
#endif

// Elements i.. of a row as fp32; lanes that the row does not have are zero.
template <class T>
BI_INLINE f32x16 load_part(const T* p, i64 count) {
  return count >= 16 ? load_f32(p) : load_few(p, count);
}
template <class T>
BI_INLINE void store_part(T* p, f32x16 x, i64 count) {
  if (count >= 16) {
    store_f32(p, x);
  } else {
    store_few(p, x, count);
  }
}

BI_INLINE void store_one(float* p, float x) { *p = x; }
template <class T>
BI_INLINE void store_one(T* p, float x) {
  p->bits = narrow(splat(x), T{})[0];
}

}  // namespace bi
