// Copies one block of a GEMM operand into the layout that the micro kernels read.
//
// A "unit" is what one step of a chain consumes: one fp32 or fp64 number, or a pair of bf16
// numbers, of k and k + 1, in 32 bits. Packed A is [rows][LDA] units, packed B ("panel") is
// [units][NR]. Bytes move as they are; f16 (and bf16 where the order is serial) become fp32,
// exactly. What lies beyond K is zero. Lanes beyond N hold copies of another column: no lane ever
// reads another, and nobody stores them.
#pragma once
#include "simd.h"

namespace bi {

constexpr i64 KC = 256;  // units per k block: a panel of 32 fp32 lanes is 32 KiB
constexpr i64 STREAM_UNITS =
    16;  // units of one step of a kernel that reads B in place: a cache line of fp32
constexpr i64 LDA = KC + 16;  // not a multiple of 4 KiB, so that rows do not share cache sets

typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x4 __attribute__((vector_size(32)));
typedef u16 u16x8 __attribute__((vector_size(16)));
typedef _Float16 h16x8 __attribute__((vector_size(16)));

BI_INLINE f32x8 load_f32x8(const float* p) { return load<f32x8>(p); }
BI_INLINE f32x8 load_f32x8(const bf16* p) {
  typedef u32 u32x8 __attribute__((vector_size(32)));
  return bit_cast<f32x8>(__builtin_convertvector(load<u16x8>(p), u32x8) << 16);
}
BI_INLINE f32x8 load_f32x8(const f16* p) { return __builtin_convertvector(load<h16x8>(p), f32x8); }

BI_INLINE f32x16 join(f32x8 low, f32x8 high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
BI_INLINE f64x8 join(f64x4 low, f64x4 high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
}

// How one (source type, unit) combination is read. LANES rows of STEP units make one transposed
// block.
template <class T>
struct ToF32 {  // one number of T -> one fp32 unit
  using Source = T;
  using Unit = float;
  using Vector = f32x16;
  static constexpr i64 PER_UNIT = 1, LANES = 16, STEP = 8;
  BI_INLINE f32x8 read(const T* p) { return load_f32x8(p); }
  BI_INLINE f32x16 read_lanes(const T* p, i64) { return load_f32(p); }
};
struct ToPair {  // two bf16 numbers -> one 32-bit unit, carried as fp32 bits that nobody computes
                 // with
  using Source = bf16;
  using Unit = float;
  using Vector = f32x16;
  static constexpr i64 PER_UNIT = 2, LANES = 16, STEP = 8;
  BI_INLINE f32x8 read(const bf16* p) { return load<f32x8>(p); }
  BI_INLINE f32x16 read_lanes(const bf16* p, i64 stride) {
    u32x16 even = __builtin_convertvector(load<u16x16>(p), u32x16);
    u32x16 odd = __builtin_convertvector(load<u16x16>(p + stride), u32x16);
    return bit_cast<f32x16>(even | (odd << 16));
  }
};
struct ToF64 {
  using Source = double;
  using Unit = double;
  using Vector = f64x8;
  static constexpr i64 PER_UNIT = 1, LANES = 8, STEP = 4;
  BI_INLINE f64x4 read(const double* p) { return load<f64x4>(p); }
  BI_INLINE f64x8 read_lanes(const double* p, i64) { return load<f64x8>(p); }
};

// Shuffles within each quarter of a vector, the same in all four: of numbers, then of pairs.
BI_INLINE f32x16 zip_low(f32x16 a, f32x16 b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}
BI_INLINE f32x16 zip_high(f32x16 a, f32x16 b) {
  return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
BI_INLINE f32x16 pairs_low(f32x16 a, f32x16 b) {
  return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
}
BI_INLINE f32x16 pairs_high(f32x16 a, f32x16 b) {
  return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

// Transposes 16 rows of 8 units, found at `at` in each: lane i of out[j] is unit j of row i. The
// rows enter as halves of a vector, which spares a quarter of the shuffles of a square transpose.
template <class How>
BI_INLINE void transpose(const typename How::Source* const* rows, i64 at, f32x16* out) {
  f32x16 mixed[2][4];
#pragma clang loop unroll(full)
  for (int half = 0; half < 2; half++) {
    f32x16 r[4];
#pragma clang loop unroll(full)
    for (int i = 0; i < 4; i++) {
      r[i] = join(How::read(rows[half * 8 + i] + at), How::read(rows[half * 8 + 4 + i] + at));
    }
    f32x16 low01 = zip_low(r[0], r[1]), high01 = zip_high(r[0], r[1]);
    f32x16 low23 = zip_low(r[2], r[3]), high23 = zip_high(r[2], r[3]);
    mixed[half][0] = pairs_low(low01, low23);
    mixed[half][1] = pairs_high(low01, low23);
    mixed[half][2] = pairs_low(high01, high23);
    mixed[half][3] = pairs_high(high01, high23);
  }
#pragma clang loop unroll(full)
  for (int j = 0; j < 4; j++) {
    f32x16 a = mixed[0][j], b = mixed[1][j];
    out[j] =
        __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    out[j + 4] =
        __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
}

// The same for 8 rows of 4 doubles.
template <class How>
BI_INLINE void transpose(const double* const* rows, i64 at, f64x8* out) {
  f64x8 mixed[2][2];
#pragma clang loop unroll(full)
  for (int half = 0; half < 2; half++) {
    const double* const* r = rows + half * 4;
    f64x8 r0 = join(How::read(r[0] + at), How::read(r[2] + at));
    f64x8 r1 = join(How::read(r[1] + at), How::read(r[3] + at));
    mixed[half][0] = __builtin_shufflevector(r0, r1, 0, 8, 2, 10, 4, 12, 6, 14);
    mixed[half][1] = __builtin_shufflevector(r0, r1, 1, 9, 3, 11, 5, 13, 7, 15);
  }
#pragma clang loop unroll(full)
  for (int j = 0; j < 2; j++) {
    f64x8 a = mixed[0][j], b = mixed[1][j];
    out[j] = __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13);
    out[j + 2] = __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
  }
}

// Packs `ks` numbers of each of `rows` rows, padded with zeros to `units`, as [rows][LDA].
template <class How>
BI_INLINE void pack_rows(const typename How::Source* a, i64 row_stride, i64 rows, i64 ks, i64 units,
                         typename How::Unit* out) {
  using Source = typename How::Source;
  constexpr i64 STEP = How::STEP, TAKE = STEP * How::PER_UNIT;
  for (i64 i = 0; i < rows; i++, a += row_stride, out += LDA) {
    i64 k = 0, u = 0;
    for (; k + TAKE <= ks; k += TAKE, u += STEP) store(out + u, How::read(a + k));
    for (; u < units; u += STEP) {
      Source rest[TAKE] = {};
      if (k < ks)
        __builtin_memcpy(rest, a + k, static_cast<size_t>(min(ks - k, TAKE)) * sizeof(Source));
      k += TAKE;
      store(out + u, How::read(rest));  // may write up to STEP - 1 units past `units`: LDA has room
    }
  }
}

// Packs `ks` numbers of `cols` rows of B as [N, K], padded to `units` and NR lanes.
template <class How, i64 NR>
BI_INLINE void pack_panel_nk(const typename How::Source* b, i64 row_stride, i64 cols, i64 ks,
                             i64 units, typename How::Unit* out) {
  using Source = typename How::Source;
  using Vector = typename How::Vector;
  constexpr i64 STEP = How::STEP, TAKE = STEP * How::PER_UNIT, LANES = How::LANES;
  constexpr i64 LINE = 64 / static_cast<i64>(sizeof(Source)), AHEAD = 8 * LINE;
  for (i64 group = 0; group < NR; group += LANES) {
    if (group >= cols) {
      for (i64 u = 0; u < units; u++) store(out + u * NR + group, Vector{});
      continue;
    }
    const Source* rows[LANES];
    for (i64 i = 0; i < LANES; i++) rows[i] = b + min(group + i, cols - 1) * row_stride;
    Vector block[STEP];
    i64 k = 0, u = 0;
    for (; k + TAKE <= ks; k += TAKE, u += STEP) {
      if (k % LINE == 0) {
#pragma clang loop unroll(full)
        for (i64 i = 0; i < LANES; i++) __builtin_prefetch(rows[i] + k + AHEAD);
      }
      transpose<How>(rows, k, block);
#pragma clang loop unroll(full)
      for (i64 j = 0; j < STEP; j++) store(out + (u + j) * NR + group, block[j]);
    }
    for (; u < units; k += TAKE, u += STEP) {
      Source rest[LANES][TAKE] = {};
      const Source* rest_rows[LANES];
      size_t bytes = static_cast<size_t>(max(min(ks - k, TAKE), 0)) * sizeof(Source);
      for (i64 i = 0; i < LANES; i++) {
        if (bytes > 0) __builtin_memcpy(rest[i], rows[i] + k, bytes);
        rest_rows[i] = rest[i];
      }
      transpose<How>(rest_rows, 0, block);
      for (i64 j = 0; j < min(STEP, units - u); j++) store(out + (u + j) * NR + group, block[j]);
    }
  }
}

// Packs `ks` rows of B as [K, N], `cols` columns of each, padded to `units` and NR lanes.
template <class How, i64 NR>
BI_INLINE void pack_panel_kn(const typename How::Source* b, i64 row_stride, i64 cols, i64 ks,
                             i64 units, typename How::Unit* out) {
  using Source = typename How::Source;
  using Vector = typename How::Vector;
  constexpr i64 PER_UNIT = How::PER_UNIT, LANES = How::LANES;
  i64 whole = cols == NR ? ks / PER_UNIT : 0;
  i64 u = 0;
  for (; u < whole; u++, b += row_stride * PER_UNIT) {
#pragma clang loop unroll(full)
    for (i64 n = 0; n < NR; n += LANES) store(out + u * NR + n, How::read_lanes(b + n, row_stride));
  }
  for (i64 k = u * PER_UNIT; u < units; u++) {
    Source rest[PER_UNIT][NR] = {};
    for (i64 i = 0; i < PER_UNIT && k < ks; i++, k++, b += row_stride) {
      __builtin_memcpy(rest[i], b, static_cast<size_t>(cols) * sizeof(Source));
    }
    for (i64 n = 0; n < NR; n += LANES)
      store<Vector>(out + u * NR + n, How::read_lanes(rest[0] + n, NR));
  }
}

}  // namespace bi
