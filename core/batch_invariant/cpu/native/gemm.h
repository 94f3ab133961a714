// What the schedule in gemm.cpp needs from the kernels of one accumulation order.
#pragma once
#include "pack.h"

namespace bi {

using PackRows = void (*)(const void* a, i64 row_stride, i64 rows, i64 ks, i64 units, void* out);
using PackPanel = void (*)(const void* b, i64 row_stride, i64 cols, i64 ks, i64 units, void* out);
using Stream = void (*)(const void* a, const void* b, i64 row_stride, i64 cols, i64 units, i64 rows,
                        void* c, bool first);
using Sweep = void (*)(const void* a, const void* b, i64 row_stride, i64 panels, i64 units,
                       i64 rows, void* c, i64 c_panel, bool first);
using Multiply = void (*)(const void* a, const void* b, i64 units, i64 rows, void* c, bool first);

// Sizes in packed units (pack.h). Accumulators have the size of a unit, and C is
// [rows][panel_lanes] of them.
struct GemmKernel {
  i64 element_bytes;  // of A and B in memory
  i64 unit_bytes;
  i64 k_per_unit;
  i64 unit_multiple;  // K is padded with zeros to a multiple of this many units
  i64 row_multiple;   // `multiply` may touch rows up to the next multiple, whose contents do not
                      // matter
  i64 panel_lanes;
  PackRows pack_rows;
  PackPanel pack_panel[2];  // B as [K, N], B as [N, K]
  Multiply multiply;
  i64 stream_rows;  // up to this many rows `stream` may be used: it reads B as [N, K] in place
  Stream stream;
  i64 sweep_rows;  // up to this many rows `sweep` may be used: it reads B as [K, N] in place
  Sweep sweep;
  void (*begin)();  // run by a thread before and after it multiplies, or null
  void (*end)();
};

// C[rows][panel_lanes] (+)= one k block of packed A times `cols` columns of B as [N, K], which hold
// `ks` numbers each; reads B in place or packs it into `panel`, whichever is faster.
inline void multiply_nk(const GemmKernel& kernel, const void* a, const void* b, i64 row_stride,
                        i64 cols, i64 ks, i64 units, i64 rows, void* panel, void* c, bool first) {
  i64 streamed =
      rows <= kernel.stream_rows ? ks / kernel.k_per_unit / STREAM_UNITS * STREAM_UNITS : 0;
  if (streamed > 0) kernel.stream(a, b, row_stride, cols, streamed, rows, c, first);
  if (streamed == units) return;
  i64 skipped = streamed * kernel.k_per_unit;
  kernel.pack_panel[1](static_cast<const char*>(b) + skipped * kernel.element_bytes, row_stride,
                       cols, ks - skipped, units - streamed, panel);
  kernel.multiply(static_cast<const char*>(a) + streamed * kernel.unit_bytes, panel,
                  units - streamed, rows, c, first && streamed == 0);
}

// One serial FMA chain over ascending k, from +0, in fp32 (fp64 for fp64): the portable order. A GEMM
// of fp32 may cut k into chunks, each with a chain of its own (gemm.cpp).
const GemmKernel* fma_kernel(DType dtype);

// The orders of bf16, fastest first. A process uses one: results of two orders have different bits.
enum Bf16Order : i32 {
  // TDPBF16PS: k in steps of 32, ascending; a step adds one sum to the chain, namely the serial FMA
  // chain
  // over its even k plus the one over its odd k. Denormals are zero.
  BF16_AMX = 0,
  // VDPBF16PS: one instruction per pair of k, ascending: a serial FMA chain over k = 1, 0, 3, 2, 5,
  // 4, ...
  // Denormals are zero.
  BF16_DOT = 1,
  BF16_SERIAL = 2,  // fma_kernel(BF16)
};
const GemmKernel* bf16_kernel(Bf16Order order);  // null where this CPU cannot

}  // namespace bi
