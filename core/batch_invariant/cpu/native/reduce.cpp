// Rows to numbers: sum, mean, prod, norms, variance.
#include "lanes.h"
#include "math.h"
#include "rows.h"

namespace bi {
namespace {

BI_INLINE f32x16 magnitude(f32x16 x) { return bit_cast<f32x16>(bit_cast<u32x16>(x) & 0x7fffffffu); }

// One long row on several threads: segments in parallel, then added up in ascending order.
template <class Op, class At>
Status reduce_long_row(int threads, i64 n, At at, float* result) {
  constexpr i64 WAVE = 64;  // segments whose lanes are held at a time
  i64 segments = ceil_div(n, SEGMENT);
  Scratch scratch((min(segments, WAVE) + 1) * LANES * static_cast<i64>(sizeof(float)));
  if (scratch.data == nullptr) return OUT_OF_MEMORY;
  float* total = scratch.as<float>();
  float* lanes = total + LANES;
  for (i64 first = 0; first < segments; first += WAVE) {
    i64 wave = min(WAVE, segments - first);
    Status status = parallel_for(threads, wave, [&](i64 task) -> Status {
      i64 begin = (first + task) * SEGMENT;
      segment_lanes<Op>(begin, min(begin + SEGMENT, n), lanes + task * LANES, at);
      return OK;
    });
    if (status != OK) return status;
    i64 task = 0;
    if (first == 0) __builtin_memcpy(total, lanes + task++ * LANES, LANES * sizeof(float));
    for (; task < wave; ++task) add_lanes<Op>(total, lanes + task * LANES, n - (first + task) * SEGMENT);
  }
  *result = fold_all_lanes<Op>(total);
  return OK;
}

// Reduces each row by Op, in parallel over rows, or over segments when rows are few and long.
// `at(x, i, count)` gives the terms i.. of the row at x, `finish(row, total)` takes the result.
template <class Op, class T, class At, class Finish>
Status reduce_rows(int threads, i64 rows, i64 n, const T* x, i64 stride, At at, Finish finish) {
  if (threads > 1 && rows < threads && n >= 2 * WORTH_A_THREAD) {
    for (i64 row = 0; row < rows; ++row) {
      const T* from = x + row * stride;
      float total;
      auto terms = [&](i64 i, i64 count) __attribute__((always_inline)) { return at(from, i, count); };
      Status status = reduce_long_row<Op>(threads, n, terms, &total);
      if (status != OK) return status;
      finish(row, total);
    }
    return OK;
  }
  return for_rows(threads, rows, n, [&](i64 row) {
    const T* from = x + row * stride;
    finish(row, reduce_row<Op>(n, [&](i64 i, i64 count) __attribute__((always_inline)) {
             return at(from, i, count);
           }));
  });
}

template <bool LARGEST_OF, class T>
float extreme_magnitude(const T* x, i64 n) {
  f32x16 best = splat(LARGEST_OF ? 0.0f : INFINITY_F32);
  i32x16 nan = {};
  for_vectors(n, [&](i64 i, i64 count) __attribute__((always_inline)) {
    f32x16 v = first_lanes(magnitude(load_part(x + i, count)), count, LARGEST_OF ? 0.0f : INFINITY_F32);
    best = (LARGEST_OF ? v > best : v < best) ? v : best;
    nan |= v != v;
  });
  float result = best[0];
  for (int i = 0; i < 16; ++i) {
    if (nan[i]) return QUIET_NAN;
    if (LARGEST_OF ? best[i] > result : best[i] < result) result = best[i];
  }
  return result;
}

template <class T, class Out>
Status reduce(i32 op, i64 rows, i64 n, const T* x, i64 stride, Out* out, int threads) {
  auto value = [](const T* p, i64 i, i64 count) __attribute__((always_inline)) { return load_part(p + i, count); };
  auto size = [](const T* p, i64 i, i64 count) __attribute__((always_inline)) {
    return magnitude(load_part(p + i, count));
  };
  auto square = [](const T* p, i64 i, i64 count) __attribute__((always_inline)) {
    f32x16 v = load_part(p + i, count);
    return v * v;
  };
  auto not_zero = [](const T* p, i64 i, i64 count) __attribute__((always_inline)) {
    return load_part(p + i, count) != 0.0f ? splat(1.0f) : splat(0.0f);
  };
  auto keep = [=](i64 row, float total) { store_result(out + row, total); };
  switch (op) {
    case REDUCE_SUM: return reduce_rows<Sum>(threads, rows, n, x, stride, value, keep);
    case REDUCE_MEAN:
      return reduce_rows<Sum>(threads, rows, n, x, stride, value,
                              [=](i64 row, float total) { store_result(out + row, total / static_cast<float>(n)); });
    case REDUCE_PROD: return reduce_rows<Product>(threads, rows, n, x, stride, value, keep);
    case REDUCE_NORM0: return reduce_rows<Sum>(threads, rows, n, x, stride, not_zero, keep);
    case REDUCE_NORM1: return reduce_rows<Sum>(threads, rows, n, x, stride, size, keep);
    case REDUCE_NORM2:
      return reduce_rows<Sum>(threads, rows, n, x, stride, square,
                              [=](i64 row, float total) { store_result(out + row, __builtin_sqrtf(total)); });
    case REDUCE_NORM_INF:
      return for_rows(threads, rows, n, [=](i64 row) { store_result(out + row, extreme_magnitude<true>(x + row * stride, n)); });
    case REDUCE_NORM_NEG_INF:
      return for_rows(threads, rows, n, [=](i64 row) { store_result(out + row, extreme_magnitude<false>(x + row * stride, n)); });
  }
  return BAD_ARGUMENT;
}

template <class T, class Out>
Status variance(bool take_sqrt, i64 rows, i64 n, const T* x, i64 stride, double correction, Out* out, Out* mean_out,
                int threads) {
  float size = static_cast<float>(n);
  float divisor = static_cast<float>(static_cast<double>(n) - correction);
  if (!(divisor > 0.0f)) divisor = 0.0f;
  auto finish = [=](i64 row, float mean, float squares) {
    float v = squares / divisor;
    store_result(out + row, take_sqrt ? __builtin_sqrtf(v) : v);
    if (mean_out != nullptr) store_result(mean_out + row, mean);
  };
  if (threads > 1 && rows < threads && n >= 2 * WORTH_A_THREAD) {
    for (i64 row = 0; row < rows; ++row) {
      const T* from = x + row * stride;
      float total, squares;
      Status status = reduce_long_row<Sum>(
          threads, n, [=](i64 i, i64 count) __attribute__((always_inline)) { return load_part(from + i, count); }, &total);
      if (status != OK) return status;
      float mean = total / size;
      status = reduce_long_row<Sum>(
          threads, n,
          [=](i64 i, i64 count) __attribute__((always_inline)) {
            f32x16 d = load_part(from + i, count) - mean;
            return d * d;
          },
          &squares);
      if (status != OK) return status;
      finish(row, mean, squares);
    }
    return OK;
  }
  return for_rows(threads, rows, n, [=](i64 row) {
    const T* from = x + row * stride;
    float mean = reduce_row<Sum>(
        n, [=](i64 i, i64 count) __attribute__((always_inline)) { return load_part(from + i, count); }) / size;
    finish(row, mean, reduce_row<Sum>(n, [=](i64 i, i64 count) __attribute__((always_inline)) {
             f32x16 d = load_part(from + i, count) - mean;
             return d * d;
           }));
  });
}

}  // namespace
}  // namespace bi

using namespace bi;

BI_EXPORT i32 bi_row_reduce(i32 op, i32 dtype, i32 out_dtype, i64 rows, i64 n, const void* x, i64 x_stride, void* out,
                            i32 threads) {
  if (rows < 0 || n < 0) return BAD_ARGUMENT;
  return with_dtypes(dtype, out_dtype, [&](auto in, auto result) -> Status {
    using T = decltype(in);
    using Out = decltype(result);
    return reduce(op, rows, n, static_cast<const T*>(x), x_stride, static_cast<Out*>(out), threads);
  });
}

BI_EXPORT i32 bi_row_var(i32 take_sqrt, i32 dtype, i32 out_dtype, i64 rows, i64 n, const void* x, i64 x_stride,
                         double correction, void* out, void* mean_out, i32 threads) {
  if (rows < 0 || n < 0) return BAD_ARGUMENT;
  return with_dtypes(dtype, out_dtype, [&](auto in, auto result) -> Status {
    using T = decltype(in);
    using Out = decltype(result);
    return variance(take_sqrt != 0, rows, n, static_cast<const T*>(x), x_stride, correction, static_cast<Out*>(out),
                    static_cast<Out*>(mean_out), threads);
  });
}
