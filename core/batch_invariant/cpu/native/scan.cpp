// Running sums along rows.
#include "lanes.h"
#include "rows.h"

namespace bi {
namespace {

// Rows whose chains run side by side: one chain alone waits for its own additions.
constexpr i64 TOGETHER = 4;

// `count` rows (at most TOGETHER), each one serial chain.
template <class T, class Out>
void cumsum_rows(i64 count, i64 n, const T* x, i64 x_stride, Out* out, i64 out_stride) {
  constexpr i64 PIECE = 256;  // prefixes are collected in fp32, then rounded in vectors
  alignas(64) float prefix[TOGETHER][PIECE];
  alignas(64) float value[TOGETHER][PIECE];
  float total[TOGETHER] = {};
  for (i64 begin = 0; begin < n; begin += PIECE) {
    i64 length = min(PIECE, n - begin);
    for (i64 r = 0; r < count; ++r) {
      const T* from = x + r * x_stride + begin;
      for_vectors(length, [&](i64 i, i64 lanes) __attribute__((always_inline)) {
        store(&value[r][i], load_part(from + i, lanes));
      });
    }
    if (count == TOGETHER) {
      for (i64 i = 0; i < length; ++i) {
        for (i64 r = 0; r < TOGETHER; ++r) prefix[r][i] = total[r] += value[r][i];
      }
    } else {
      for (i64 r = 0; r < count; ++r) {
        for (i64 i = 0; i < length; ++i) prefix[r][i] = total[r] += value[r][i];
      }
    }
    for (i64 r = 0; r < count; ++r) {
      Out* to = out + r * out_stride + begin;
      for_vectors(length, [&](i64 i, i64 lanes) __attribute__((always_inline)) {
        store_result(to + i, load<f32x16>(&prefix[r][i]), lanes);
      });
    }
  }
}

}  // namespace
}  // namespace bi

using namespace bi;

BI_EXPORT i32 bi_row_cumsum(i32 dtype, i32 out_dtype, i64 rows, i64 n, const void* x, i64 x_stride,
                            void* out, i64 out_stride, i32 threads) {
  if (rows < 0 || n < 0) return BAD_ARGUMENT;
  return with_dtypes(dtype, out_dtype, [&](auto in, auto result) -> Status {
    using T = decltype(in);
    using Out = decltype(result);
    i64 together = max(1, min(TOGETHER, rows / max(threads, 1)));
    return for_rows(threads, ceil_div(rows, together), n * together, [=](i64 group) {
      i64 first = group * together;
      cumsum_rows(min(together, rows - first), n, static_cast<const T*>(x) + first * x_stride,
                  x_stride, static_cast<Out*>(out) + first * out_stride, out_stride);
    });
  });
}
