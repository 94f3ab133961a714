// softmax, log_softmax and logsumexp over rows, and the gradients of the first two.
#include "lanes.h"
#include "math.h"
#include "rows.h"
#include "terms.h"

namespace bi {
namespace {

// The largest number in a row, NaN left out: a NaN element makes its own exponential, and so the
// sum, NaN. Which zero wins where zeros of both signs are the largest does not matter: x - max is a
// zero, and the logarithm taken off it is at least log 2.
template <class T>
__attribute__((noinline)) float row_max(const T* x, i64 n) {
  f32x16 best[4];
  for (auto& b : best) b = splat(-INFINITY_F32);
  auto larger = [](f32x16 v, f32x16 b) __attribute__((always_inline)) { return v > b ? v : b; };
  i64 i = 0;
  for (; i + 64 <= n; i += 64) {
    for (i64 j = 0; j < 4; ++j) best[j] = larger(load_f32(x + i + 16 * j), best[j]);
  }
  for (; i + 16 <= n; i += 16) best[0] = larger(load_f32(x + i), best[0]);
  if (i < n) best[0] = larger(first_lanes(load_part(x + i, n - i), n - i, -INFINITY_F32), best[0]);
  best[0] = larger(larger(best[0], best[1]), larger(best[2], best[3]));
  float result = best[0][0];
  for (int lane = 1; lane < 16; ++lane) result = best[0][lane] > result ? best[0][lane] : result;
  return result;
}

// Whether results of that type are made of short exponentials.
template <class Out>
constexpr bool SHORT = sizeof(Out) < sizeof(float);

// `exponentials` holds n floats; it may be `out` itself.
template <class T, class Out>
void softmax_row(const T* x, i64 n, Out* out, float* exponentials) {
  using Terms = Exponentials<T, SHORT<Out>, true>;
  float sum = reduce_row<Sum>(n, Terms{x, row_max(x, n), exponentials});
  float reciprocal = 1.0f / sum;
  for_vectors(n, [=](i64 i, i64 count) __attribute__((always_inline)) {
    f32x16 e = load_part(exponentials + i, count);
    store_result(out + i, SHORT<Out> ? e * reciprocal : e / sum, count);
  });
}

template <class T, class Out>
void log_softmax_row(const T* x, i64 n, Out* out) {
  float max = row_max(x, n);
  float log_sum = log(reduce_row<Sum>(n, Exponentials<T, SHORT<Out>, false>{x, max}));
  for_vectors(n, [=](i64 i, i64 count) __attribute__((always_inline)) {
    store_result(out + i, (load_part(x + i, count) - max) - log_sum, count);
  });
}

template <class T, class Out>
Status softmax(i32 op, i64 rows, i64 n, const T* x, i64 x_stride, Out* out, i64 out_stride,
               int threads) {
  if (op == LOG_SOFTMAX) {
    return for_rows(threads, rows, n, [=](i64 row) {
      log_softmax_row(x + row * x_stride, n, out + row * out_stride);
    });
  }
  if (op != SOFTMAX) return BAD_ARGUMENT;
  if constexpr (sizeof(Out) == sizeof(float)) {
    return for_rows(threads, rows, n, [=](i64 row) {
      softmax_row(x + row * x_stride, n, out + row * out_stride, out + row * out_stride);
    });
  } else {
    return for_row_ranges(threads, rows, n, [=](i64 begin, i64 end) -> Status {
      Scratch exponentials(n * static_cast<i64>(sizeof(float)));
      if (exponentials.data == nullptr) return OUT_OF_MEMORY;
      for (i64 row = begin; row < end; ++row) {
        softmax_row(x + row * x_stride, n, out + row * out_stride, exponentials.as<float>());
      }
      return OK;
    });
  }
}

template <class T>
float log_sum_exp(const T* x, i64 n) {
  float max = row_max(x, n);
  if (__builtin_fabsf(max) == INFINITY_F32) max = 0.0f;
  return max + log(reduce_row<Sum>(n, Exponentials<T, false, false>{x, max}));
}

template <class T, class Out>
Status softmax_backward(i32 op, i64 rows, i64 n, const T* g, i64 g_stride, const T* y, i64 y_stride,
                        Out* out, i64 out_stride, int threads) {
  if (op != SOFTMAX && op != LOG_SOFTMAX) return BAD_ARGUMENT;
  return for_rows(threads, rows, n, [=](i64 row) {
    const T* gr = g + row * g_stride;
    const T* yr = y + row * y_stride;
    Out* to = out + row * out_stride;
    if (op == SOFTMAX) {
      float sum = reduce_row<Sum>(n, Products<T>{gr, yr});
      for_vectors(n, [=](i64 i, i64 count) __attribute__((always_inline)) {
        store_result(to + i, (load_part(gr + i, count) - sum) * load_part(yr + i, count), count);
      });
    } else {
      float sum = reduce_row<Sum>(n, Values<T>{gr});
      for_vectors(n, [=](i64 i, i64 count) __attribute__((always_inline)) {
        store_result(to + i, load_part(gr + i, count) - exp(load_part(yr + i, count)) * sum, count);
      });
    }
  });
}

}  // namespace
}  // namespace bi

using namespace bi;

BI_EXPORT i32 bi_row_softmax(i32 op, i32 dtype, i32 out_dtype, i64 rows, i64 n, const void* x,
                             i64 x_stride, void* out, i64 out_stride, i32 threads) {
  if (rows < 0 || n < 0) return BAD_ARGUMENT;
  return with_dtypes(dtype, out_dtype, [&](auto in, auto result) -> Status {
    using T = decltype(in);
    using Out = decltype(result);
    return softmax(op, rows, n, static_cast<const T*>(x), x_stride, static_cast<Out*>(out),
                   out_stride, threads);
  });
}

BI_EXPORT i32 bi_row_logsumexp(i32 dtype, i32 out_dtype, i64 rows, i64 n, const void* x,
                               i64 x_stride, void* out, i32 threads) {
  if (rows < 0 || n < 0) return BAD_ARGUMENT;
  return with_dtypes(dtype, out_dtype, [&](auto in, auto result) -> Status {
    using T = decltype(in);
    using Out = decltype(result);
    return for_rows(threads, rows, n, [=](i64 row) {
      store_result(static_cast<Out*>(out) + row,
                   log_sum_exp(static_cast<const T*>(x) + row * x_stride, n));
    });
  });
}

BI_EXPORT i32 bi_row_softmax_backward(i32 op, i32 dtype, i32 out_dtype, i64 rows, i64 n,
                                      const void* g, i64 g_stride, const void* y, i64 y_stride,
                                      void* out, i64 out_stride, i32 threads) {
  if (rows < 0 || n < 0) return BAD_ARGUMENT;
  return with_dtypes(dtype, out_dtype, [&](auto in, auto result) -> Status {
    using T = decltype(in);
    using Out = decltype(result);
    return softmax_backward(op, rows, n, static_cast<const T*>(g), g_stride,
                            static_cast<const T*>(y), y_stride, static_cast<Out*>(out), out_stride,
                            threads);
  });
}
