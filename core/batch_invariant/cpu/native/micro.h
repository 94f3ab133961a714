// The inner loops of a GEMM: C[rows][NR] (+)= A[rows][LDA] * B[units][NR], all packed, one chain per element
// in ascending k. C holds the accumulators between k blocks, unrounded, so blocking does not show.
#pragma once
#include "pack.h"

namespace bi {

// `Step::step(a, b, c)` extends a vector of chains by one unit; a is the same in all lanes.
template <class Step, int MR, int NV>
BI_INLINE void micro_tile(const typename Step::Unit* a, const typename Step::Unit* b, i64 units,
                          typename Step::Unit* c, bool first) {
  using Vector = typename Step::Vector;
  constexpr i64 LANES = sizeof(Vector) / sizeof(typename Step::Unit), NR = NV * LANES;
  Vector acc[MR][NV];
#pragma clang loop unroll(full)
  for (int i = 0; i < MR; i++) {
#pragma clang loop unroll(full)
    for (int v = 0; v < NV; v++) acc[i][v] = first ? Vector{} : load<Vector>(c + i * NR + v * LANES);
  }
#pragma clang loop unroll(disable)
  for (i64 u = 0; u < units; u++) {
    Vector lanes[NV];
#pragma clang loop unroll(full)
    for (int v = 0; v < NV; v++) lanes[v] = load<Vector>(b + u * NR + v * LANES);
#pragma clang loop unroll(full)
    for (int i = 0; i < MR; i++) {
      Vector same = splat(a[i * LDA + u]);
#pragma clang loop unroll(full)
      for (int v = 0; v < NV; v++) acc[i][v] = Step::step(same, lanes[v], acc[i][v]);
    }
  }
#pragma clang loop unroll(full)
  for (int i = 0; i < MR; i++) {
#pragma clang loop unroll(full)
    for (int v = 0; v < NV; v++) store(c + i * NR + v * LANES, acc[i][v]);
  }
}

// The number of rows as a compile-time constant, searched from MR downwards.
template <class Step, int MR, int NV>
BI_INLINE void micro_rows(i64 rows, const typename Step::Unit* a, const typename Step::Unit* b, i64 units,
                          typename Step::Unit* c, bool first) {
  if (rows == MR) return micro_tile<Step, MR, NV>(a, b, units, c, first);
  if constexpr (MR > 1) micro_rows<Step, MR - 1, NV>(rows, a, b, units, c, first);
}

// Any number of rows, cut into tiles of nearly equal height: 13 rows are 7 + 6, not 12 + 1.
template <class Step, int MR, int NV>
BI_INLINE void multiply_block(const typename Step::Unit* a, const typename Step::Unit* b, i64 units, i64 rows,
                              typename Step::Unit* c, bool first) {
  constexpr i64 NR = NV * static_cast<i64>(sizeof(typename Step::Vector) / sizeof(typename Step::Unit));
  i64 tiles = ceil_div(rows, MR), row = 0;
  for (i64 t = 0; t < tiles; t++) {
    i64 next = rows * (t + 1) / tiles;
    micro_rows<Step, MR, NV>(next - row, a + row * LDA, b, units, c + row * NR, first);
    row = next;
  }
}

// One FMA per unit: the portable order.
struct FmaF32 {
  using Unit = float;
  using Vector = f32x16;
  BI_INLINE f32x16 step(f32x16 a, f32x16 b, f32x16 c) { return fma(a, b, c); }
};
struct FmaF64 {
  using Unit = double;
  using Vector = f64x8;
  BI_INLINE f64x8 step(f64x8 a, f64x8 b, f64x8 c) { return fma(a, b, c); }
};

// Tile heights and widths that fill the vector registers of each instruction set.
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12, TILE_VECTORS = 2;
#else
constexpr int TILE_ROWS = 6, TILE_VECTORS = 1;
#endif

}  // namespace bi
