// Rows to numbers: sum, mean, prod, norms, variance.
#include "lanes.h"
#include "math.h"
#include "rows.h"
#include "terms.h"

namespace bi {
namespace {

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
    for (; task < wave; ++task)
      add_lanes<Op>(total, lanes + task * LANES, n - (first + task) * SEGMENT);
  }
  *result = fold_all_lanes<Op>(total);
  return OK;
}

bool few_long_rows(int threads, i64 rows, i64 n) {
  return threads > 1 && rows < threads && n >= 2 * WORTH_A_THREAD;
}

// Reduces each row by Op, in parallel over rows, or over segments when rows are few and long.
// `finish(row, total)` takes the result.
template <class Op, class At, class T, class Finish>
Status reduce_rows(int threads, i64 rows, i64 n, const T* x, i64 stride, Finish finish) {
  if (few_long_rows(threads, rows, n)) {
    for (i64 row = 0; row < rows; ++row) {
      float total;
      Status status = reduce_long_row<Op>(threads, n, At{x + row * stride}, &total);
      if (status != OK) return status;
      finish(row, total);
    }
    return OK;
  }
  return for_rows(threads, rows, n,
                  [=](i64 row) { finish(row, reduce_row<Op>(n, At{x + row * stride})); });
}

template <bool LARGEST_OF, class T>
float extreme_magnitude(const T* x, i64 n) {
  constexpr float NONE = LARGEST_OF ? 0.0f : INFINITY_F32;
  f32x16 best = splat(NONE);
  i32x16 nan = {};
  for_vectors(n, [&](i64 i, i64 count) __attribute__((always_inline)) {
    f32x16 v = first_lanes(magnitude(load_part(x + i, count)), count, NONE);
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

// `keep(row, value)` rounds and stores.
template <class T, class Keep>
Status reduce(i32 op, i64 rows, i64 n, const T* x, i64 stride, int threads, Keep keep) {
  float size = static_cast<float>(n);
  switch (op) {
    case REDUCE_SUM:
      return reduce_rows<Sum, Values<T>>(threads, rows, n, x, stride, keep);
    case REDUCE_MEAN:
      return reduce_rows<Sum, Values<T>>(threads, rows, n, x, stride,
                                         [=](i64 row, float total) { keep(row, total / size); });
    case REDUCE_PROD:
      return reduce_rows<Product, Values<T>>(threads, rows, n, x, stride, keep);
    case REDUCE_NORM0:
      return reduce_rows<Sum, NonZeros<T>>(threads, rows, n, x, stride, keep);
    case REDUCE_NORM1:
      return reduce_rows<Sum, Magnitudes<T>>(threads, rows, n, x, stride, keep);
    case REDUCE_NORM2:
      return reduce_rows<Sum, Squares<T>>(threads, rows, n, x, stride, [=](i64 row, float total) {
        keep(row, __builtin_sqrtf(total));
      });
    case REDUCE_NORM_INF:
      return for_rows(threads, rows, n,
                      [=](i64 row) { keep(row, extreme_magnitude<true>(x + row * stride, n)); });
    case REDUCE_NORM_NEG_INF:
      return for_rows(threads, rows, n,
                      [=](i64 row) { keep(row, extreme_magnitude<false>(x + row * stride, n)); });
  }
  return BAD_ARGUMENT;
}

// `keep(row, mean, lane sum of the squared differences)` does the rest.
template <class T, class Keep>
Status variance(i64 rows, i64 n, const T* x, i64 stride, int threads, Keep keep) {
  float size = static_cast<float>(n);
  if (few_long_rows(threads, rows, n)) {
    for (i64 row = 0; row < rows; ++row) {
      const T* from = x + row * stride;
      float total, squares;
      Status status = reduce_long_row<Sum>(threads, n, Values<T>{from}, &total);
      if (status != OK) return status;
      float mean = total / size;
      status = reduce_long_row<Sum>(threads, n, SquaredDifferences<T>{from, mean}, &squares);
      if (status != OK) return status;
      keep(row, mean, squares);
    }
    return OK;
  }
  return for_rows(threads, rows, n, [=](i64 row) {
    const T* from = x + row * stride;
    float mean = reduce_row<Sum>(n, Values<T>{from}) / size;
    keep(row, mean, reduce_row<Sum>(n, SquaredDifferences<T>{from, mean}));
  });
}

}  // namespace
}  // namespace bi

using namespace bi;

BI_EXPORT i32 bi_row_reduce(i32 op, i32 dtype, i32 out_dtype, i64 rows, i64 n, const void* x,
                            i64 x_stride, void* out, i32 threads) {
  if (rows < 0 || n < 0) return BAD_ARGUMENT;
  return with_dtypes(dtype, out_dtype, [&](auto in, auto result) -> Status {
    using T = decltype(in);
    using Out = decltype(result);
    Out* to = static_cast<Out*>(out);
    return reduce(op, rows, n, static_cast<const T*>(x), x_stride, threads,
                  [=](i64 row, float value) { store_result(to + row, value); });
  });
}

BI_EXPORT i32 bi_row_var(i32 take_sqrt, i32 dtype, i32 out_dtype, i64 rows, i64 n, const void* x,
                         i64 x_stride, double correction, void* out, void* mean_out, i32 threads) {
  if (rows < 0 || n < 0) return BAD_ARGUMENT;
  float divisor = static_cast<float>(static_cast<double>(n) - correction);
  if (!(divisor > 0.0f)) divisor = 0.0f;
  return with_dtypes(dtype, out_dtype, [&](auto in, auto result) -> Status {
    using T = decltype(in);
    using Out = decltype(result);
    Out* to = static_cast<Out*>(out);
    Out* mean_to = static_cast<Out*>(mean_out);
    return variance(rows, n, static_cast<const T*>(x), x_stride, threads,
                    [=](i64 row, float mean, float squares) {
                      float v = squares / divisor;
                      store_result(to + row, take_sqrt != 0 ? __builtin_sqrtf(v) : v);
                      if (mean_to != nullptr) store_result(mean_to + row, mean);
                    });
  });
}
