// The GEMM kernels of bf16 instructions. They are compiled for CPUs that have them and are reached
// only after cpu_features() said so.
#include "cpu_features.h"
#include "gemm.h"

#if defined(__x86_64__) && defined(__AVX512F__)

namespace bi {
namespace {

constexpr i64 NR = 32;
constexpr int DOT_STREAM_ROWS = 6;  // more would not leave registers for the transposes

void pack_rows_of_pairs(const void* a, i64 stride, i64 rows, i64 ks, i64 units, void* out) {
  pack_rows<ToPair>(static_cast<const bf16*>(a), stride, rows, ks, units, static_cast<float*>(out));
}
void pack_kn(const void* b, i64 stride, i64 cols, i64 ks, i64 units, void* out) {
  pack_panel_kn<ToPair, NR>(static_cast<const bf16*>(b), stride, cols, ks, units,
                            static_cast<float*>(out));
}
void pack_nk(const void* b, i64 stride, i64 cols, i64 ks, i64 units, void* out) {
  pack_panel_nk<ToPair, NR>(static_cast<const bf16*>(b), stride, cols, ks, units,
                            static_cast<float*>(out));
}

}  // namespace
}  // namespace bi

#pragma clang attribute push(__attribute__((target("avx512bf16"))), apply_to = function)
#include "micro.h"

namespace bi {
namespace {

typedef __bf16 bf16x32 __attribute__((vector_size(64)));

struct Dot {
  using Unit = float;
  using Vector = f32x16;
  BI_INLINE f32x16 step(f32x16 a, f32x16 b, f32x16 c) {
    return __builtin_ia32_dpbf16ps_512(c, bit_cast<bf16x32>(a), bit_cast<bf16x32>(b));
  }
};

void multiply_dot(const void* a, const void* b, i64 units, i64 rows, void* c, bool first) {
  multiply_block<Dot, TILE_ROWS, TILE_VECTORS>(static_cast<const float*>(a),
                                               static_cast<const float*>(b), units, rows,
                                               static_cast<float*>(c), first);
}

void stream_dot(const void* a, const void* b, i64 stride, i64 cols, i64 units, i64 rows, void* c,
                bool first) {
  stream_rows<ToPair, Dot, DOT_STREAM_ROWS, TILE_VECTORS>(rows, static_cast<const float*>(a),
                                                          static_cast<const bf16*>(b), stride, cols,
                                                          units, static_cast<float*>(c), first);
}

void sweep_dot(const void* a, const void* b, i64 stride, i64 panels, i64 units, i64 rows, void* c,
               i64 c_panel, bool first) {
  sweep_rows<ToPair, Dot, SWEEP_ROWS, TILE_VECTORS>(rows, static_cast<const float*>(a),
                                                    static_cast<const bf16*>(b), stride, panels,
                                                    units, static_cast<float*>(c), c_panel, first);
}

}  // namespace
}  // namespace bi
#pragma clang attribute pop

#pragma clang attribute push(__attribute__((target("amx-bf16,amx-tile"))), apply_to = function)
namespace bi {
namespace {

constexpr i64 TILE = 16;  // rows, columns and units of a tile

struct alignas(64) TileConfig {
  u8 palette = 1, start_row = 0, reserved[14] = {};
  u16 row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  u8 rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
};

void begin_amx() {
  static constexpr TileConfig config;
  __builtin_ia32_tile_loadconfig(&config);
}
void end_amx() { __builtin_ia32_tilerelease(); }

// Tiles 0..3 accumulate a 32 x 32 (or 16 x 32) block of C; 4, 5 hold A, and 6, 7 hold B.
template <bool TALL>
BI_INLINE void multiply_tiles(const float* a, const float* b, i64 units, float* c, bool first) {
  constexpr i64 ROW = NR * sizeof(float), A_ROW = LDA * sizeof(float);
  if (first) {
    __builtin_ia32_tilezero(0);
    __builtin_ia32_tilezero(1);
    if (TALL) {
      __builtin_ia32_tilezero(2);
      __builtin_ia32_tilezero(3);
    }
  } else {
    __builtin_ia32_tileloadd64(0, c, ROW);
    __builtin_ia32_tileloadd64(1, c + TILE, ROW);
    if (TALL) {
      __builtin_ia32_tileloadd64(2, c + TILE * NR, ROW);
      __builtin_ia32_tileloadd64(3, c + TILE * NR + TILE, ROW);
    }
  }
  for (i64 u = 0; u < units; u += TILE) {
    __builtin_ia32_tileloadd64(6, b + u * NR, ROW);
    __builtin_ia32_tileloadd64(7, b + u * NR + TILE, ROW);
    __builtin_ia32_tileloadd64(4, a + u, A_ROW);
    __builtin_ia32_tdpbf16ps(0, 4, 6);
    __builtin_ia32_tdpbf16ps(1, 4, 7);
    if (TALL) {
      __builtin_ia32_tileloadd64(5, a + TILE * LDA + u, A_ROW);
      __builtin_ia32_tdpbf16ps(2, 5, 6);
      __builtin_ia32_tdpbf16ps(3, 5, 7);
    }
  }
  __builtin_ia32_tilestored64(0, c, ROW);
  __builtin_ia32_tilestored64(1, c + TILE, ROW);
  if (TALL) {
    __builtin_ia32_tilestored64(2, c + TILE * NR, ROW);
    __builtin_ia32_tilestored64(3, c + TILE * NR + TILE, ROW);
  }
}

void multiply_amx(const void* a, const void* b, i64 units, i64 rows, void* c, bool first) {
  const float* from = static_cast<const float*>(a);
  const float* panel = static_cast<const float*>(b);
  float* to = static_cast<float*>(c);
  i64 row = 0;
  for (; row + TILE < rows; row += 2 * TILE) {
    multiply_tiles<true>(from + row * LDA, panel, units, to + row * NR, first);
  }
  if (row < rows) multiply_tiles<false>(from + row * LDA, panel, units, to + row * NR, first);
}

}  // namespace
}  // namespace bi
#pragma clang attribute pop

namespace bi {

const GemmKernel* bf16_kernel(Bf16Order order) {
  static constexpr GemmKernel amx = {2,
                                     4,
                                     2,
                                     TILE,
                                     TILE,
                                     NR,
                                     pack_rows_of_pairs,
                                     {pack_kn, pack_nk},
                                     multiply_amx,
                                     0,
                                     nullptr,
                                     0,
                                     nullptr,
                                     begin_amx,
                                     end_amx};
  static constexpr GemmKernel dot = {2,
                                     4,
                                     2,
                                     1,
                                     1,
                                     NR,
                                     pack_rows_of_pairs,
                                     {pack_kn, pack_nk},
                                     multiply_dot,
                                     DOT_STREAM_ROWS,
                                     stream_dot,
                                     SWEEP_ROWS,
                                     sweep_dot,
                                     nullptr,
                                     nullptr};
  switch (order) {
    case BF16_AMX:
      return (cpu_features() & CPU_AMX_BF16) != 0 ? &amx : nullptr;
    case BF16_DOT:
      return (cpu_features() & CPU_AVX512_BF16) != 0 ? &dot : nullptr;
    case BF16_SERIAL:
      return fma_kernel(BF16);
  }
  return nullptr;
}

}  // namespace bi

#else

namespace bi {

const GemmKernel* bf16_kernel(Bf16Order order) {
  return order == BF16_SERIAL ? fma_kernel(BF16) : nullptr;
}

}  // namespace bi

#endif
