// The inner loops of a GEMM: C[rows][NR] (+)= A[rows][LDA] * B[units][NR], all packed, one chain
// per element in ascending k. C holds the accumulators between k blocks, unrounded, so blocking
// does not show.
#pragma once
#include "pack.h"

namespace bi {

// Tile heights and widths that fill the vector registers of each instruction set; up to STREAM_ROWS
// rows of A
// ([N, K]) or SWEEP_ROWS ([K, N]), reading B in place is faster than packing it.
constexpr int SWEEP_ROWS = 8;
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12, TILE_VECTORS = 2, STREAM_ROWS = 12;
#else
constexpr int TILE_ROWS = 6, TILE_VECTORS = 1, STREAM_ROWS = 2;
#endif

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
    for (int v = 0; v < NV; v++)
      acc[i][v] = first ? Vector{} : load<Vector>(c + i * NR + v * LANES);
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
BI_INLINE void micro_rows(i64 rows, const typename Step::Unit* a, const typename Step::Unit* b,
                          i64 units, typename Step::Unit* c, bool first) {
  if (rows == MR) return micro_tile<Step, MR, NV>(a, b, units, c, first);
  if constexpr (MR > 1) micro_rows<Step, MR - 1, NV>(rows, a, b, units, c, first);
}

// Any number of rows, cut into tiles of nearly equal height: 13 rows are 7 + 6, not 12 + 1.
template <class Step, int MR, int NV>
BI_INLINE void multiply_block(const typename Step::Unit* a, const typename Step::Unit* b, i64 units,
                              i64 rows, typename Step::Unit* c, bool first) {
  constexpr i64 NR =
      NV * static_cast<i64>(sizeof(typename Step::Vector) / sizeof(typename Step::Unit));
  i64 tiles = ceil_div(rows, MR), row = 0;
  for (i64 t = 0; t < tiles; t++) {
    i64 next = rows * (t + 1) / tiles;
    micro_rows<Step, MR, NV>(next - row, a + row * LDA, b, units, c + row * NR, first);
    row = next;
  }
}

// C[rows][NR] (+)= A[rows][LDA] * B with B read in place, as [N, K]: for a few rows this is faster
// than packing a panel, since what is transposed is used at once. `units` is a multiple of
// STREAM_UNITS, all of it in B.
template <class How, class Step, int MR, int NV>
BI_INLINE void stream_tile(const typename Step::Unit* a, const typename How::Source* b,
                           i64 row_stride, i64 cols, i64 units, typename Step::Unit* c,
                           bool first) {
  using Vector = typename Step::Vector;
  using Source = typename How::Source;
  constexpr i64 LANES = How::LANES, NR = NV * LANES, STEP = How::STEP;
  constexpr i64 AHEAD = 256 / static_cast<i64>(sizeof(Source));
  const Source* rows[NR];
  for (i64 i = 0; i < NR; i++) rows[i] = b + min(i, cols - 1) * row_stride;
  Vector acc[MR][NV];
#pragma clang loop unroll(full)
  for (int i = 0; i < MR; i++) {
#pragma clang loop unroll(full)
    for (int v = 0; v < NV; v++)
      acc[i][v] = first ? Vector{} : load<Vector>(c + i * NR + v * LANES);
  }
#pragma clang loop unroll(disable)
  for (i64 u0 = 0; u0 < units; u0 += STREAM_UNITS) {
#pragma clang loop unroll(full)
    for (int v = 0; v < NV; v++) {
#pragma clang loop unroll(full)
      for (i64 i = 0; i < LANES; i++)
        __builtin_prefetch(rows[v * LANES + i] + u0 * How::PER_UNIT + AHEAD);
#pragma clang loop unroll(disable)
      for (i64 u = u0; u < u0 + STREAM_UNITS; u += STEP) {
        Vector block[STEP];
        transpose<How>(rows + v * LANES, u * How::PER_UNIT, block);
#pragma clang loop unroll(full)
        for (int j = 0; j < STEP; j++) {
#pragma clang loop unroll(full)
          for (int i = 0; i < MR; i++)
            acc[i][v] = Step::step(splat(a[i * LDA + u + j]), block[j], acc[i][v]);
        }
      }
    }
  }
#pragma clang loop unroll(full)
  for (int i = 0; i < MR; i++) {
#pragma clang loop unroll(full)
    for (int v = 0; v < NV; v++) store(c + i * NR + v * LANES, acc[i][v]);
  }
}

template <class How, class Step, int MR, int NV>
BI_INLINE void stream_rows(i64 rows, const typename Step::Unit* a, const typename How::Source* b,
                           i64 row_stride, i64 cols, i64 units, typename Step::Unit* c,
                           bool first) {
  if (rows == MR) return stream_tile<How, Step, MR, NV>(a, b, row_stride, cols, units, c, first);
  if constexpr (MR > 1)
    stream_rows<How, Step, MR - 1, NV>(rows, a, b, row_stride, cols, units, c, first);
}

// C[panels][rows][NR] (+)= A[rows][LDA] * B with B read in place, as [K, N], a few long rows of B
// at a time, which is what memory is fast at. `c_panel` is the distance of two panels of C. All of
// the units and columns exist.
template <class How, class Step, int MR, int NV, int UNITS>
BI_INLINE void sweep_units(const typename Step::Unit* a, const typename How::Source* b,
                           i64 row_stride, i64 panels, typename Step::Unit* c, i64 c_panel,
                           bool first) {
  using Vector = typename Step::Vector;
  constexpr i64 LANES = How::LANES, NR = NV * LANES;
  for (i64 p = 0; p < panels; p++, b += NR, c += c_panel) {
#pragma clang loop unroll(full)
    for (int v = 0; v < NV; v++) {
      Vector lanes[UNITS];
#pragma clang loop unroll(full)
      for (int u = 0; u < UNITS; u++) {
        lanes[u] = How::read_lanes(b + u * How::PER_UNIT * row_stride + v * LANES, row_stride);
      }
#pragma clang loop unroll(full)
      for (int i = 0; i < MR; i++) {
        Vector acc = first ? Vector{} : load<Vector>(c + i * NR + v * LANES);
#pragma clang loop unroll(full)
        for (int u = 0; u < UNITS; u++) acc = Step::step(splat(a[i * LDA + u]), lanes[u], acc);
        store(c + i * NR + v * LANES, acc);
      }
    }
  }
}

template <class How, class Step, int MR, int NV>
BI_INLINE void sweep_rows(i64 rows, const typename Step::Unit* a, const typename How::Source* b,
                          i64 row_stride, i64 panels, i64 units, typename Step::Unit* c,
                          i64 c_panel, bool first) {
  if (rows == MR) {
    constexpr int UNITS = 8;
    i64 u = 0;
    for (; u + UNITS <= units; u += UNITS, first = false) {
      sweep_units<How, Step, MR, NV, UNITS>(a + u, b + u * How::PER_UNIT * row_stride, row_stride,
                                            panels, c, c_panel, first);
    }
    for (; u < units; u++, first = false) {
      sweep_units<How, Step, MR, NV, 1>(a + u, b + u * How::PER_UNIT * row_stride, row_stride,
                                        panels, c, c_panel, first);
    }
    return;
  }
  if constexpr (MR > 1) {
    sweep_rows<How, Step, MR - 1, NV>(rows, a, b, row_stride, panels, units, c, c_panel, first);
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

}  // namespace bi
