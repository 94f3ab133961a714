// The GEMM kernels of the portable order.
#include "gemm.h"
#include "micro.h"

namespace bi {
namespace {

template <class How, class Step, int VECTORS>
struct Kernel {
  using Source = typename How::Source;
  using Unit = typename How::Unit;
  static constexpr i64 NR = VECTORS * How::LANES;

  static void rows(const void* a, i64 stride, i64 rows, i64 ks, i64 units, void* out) {
    pack_rows<How>(static_cast<const Source*>(a), stride, rows, ks, units, static_cast<Unit*>(out));
  }
  static void kn(const void* b, i64 stride, i64 cols, i64 ks, i64 units, void* out) {
    pack_panel_kn<How, NR>(static_cast<const Source*>(b), stride, cols, ks, units,
                           static_cast<Unit*>(out));
  }
  static void nk(const void* b, i64 stride, i64 cols, i64 ks, i64 units, void* out) {
    pack_panel_nk<How, NR>(static_cast<const Source*>(b), stride, cols, ks, units,
                           static_cast<Unit*>(out));
  }
  static void multiply(const void* a, const void* b, i64 units, i64 rows, void* c, bool first) {
    multiply_block<Step, TILE_ROWS, VECTORS>(static_cast<const Unit*>(a),
                                             static_cast<const Unit*>(b), units, rows,
                                             static_cast<Unit*>(c), first);
  }
  static void stream(const void* a, const void* b, i64 stride, i64 cols, i64 units, i64 rows,
                     void* c, bool first) {
    stream_rows<How, Step, STREAM_ROWS, VECTORS>(rows, static_cast<const Unit*>(a),
                                                 static_cast<const Source*>(b), stride, cols, units,
                                                 static_cast<Unit*>(c), first);
  }
  static void sweep(const void* a, const void* b, i64 stride, i64 panels, i64 units, i64 rows,
                    void* c, i64 c_panel, bool first) {
    sweep_rows<How, Step, SWEEP_ROWS, VECTORS>(rows, static_cast<const Unit*>(a),
                                               static_cast<const Source*>(b), stride, panels, units,
                                               static_cast<Unit*>(c), c_panel, first);
  }
  static constexpr GemmKernel value = {
      sizeof(Source), sizeof(Unit), 1,      1,          1,     NR,      rows,   {kn, nk},
      multiply,       STREAM_ROWS,  stream, SWEEP_ROWS, sweep, nullptr, nullptr};
};

}  // namespace

const GemmKernel* fma_kernel(DType dtype) {
  switch (dtype) {
    case F32:
      return &Kernel<ToF32<float>, FmaF32, TILE_VECTORS>::value;
    case F64:
      return &Kernel<ToF64, FmaF64, TILE_VECTORS>::value;
    case BF16:
      return &Kernel<ToF32<bf16>, FmaF32, TILE_VECTORS>::value;
    case F16:
      return &Kernel<ToF32<f16>, FmaF32, TILE_VECTORS>::value;
  }
  return nullptr;
}

}  // namespace bi
