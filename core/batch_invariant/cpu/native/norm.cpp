// rms_norm, layer_norm and group_norm over rows, and the gradients of their inputs.
#include "lanes.h"
#include "math.h"
#include "rows.h"
#include "terms.h"

namespace bi {
namespace {

BI_INLINE float rsqrt(float mean_square, float eps) {
  return 1.0f / __builtin_sqrtf(mean_square + eps);
}

// A weight or bias of the input's type or fp32, or none: at most one of the pointers is set.
template <class T>
struct Parameter {
  const T* same = nullptr;
  const float* wide = nullptr;

  Parameter(const void* data, bool is_wide) {
    if (is_wide) {
      wide = static_cast<const float*>(data);
    } else {
      same = static_cast<const T*>(data);
    }
  }
  __attribute__((always_inline)) bool given() const { return same != nullptr || wide != nullptr; }
  __attribute__((always_inline)) f32x16 at(i64 i, i64 count) const {
    return wide != nullptr ? load_part(wide + i, count) : load_part(same + i, count);
  }
  float one(i64 i) const { return wide != nullptr ? wide[i] : to_f32(same[i]); }
};

template <class T>
struct RmsNorm {
  i64 n, variance_size, x_stride, residual_stride, residual_out_stride;
  float eps;
  const T *x, *residual;
  Parameter<T> weight;
  T* residual_out;
  float* rstd;

  template <bool RESIDUAL, class Out>
  void row(i64 index, Out* to) const {
    const T* from = x + index * x_stride;
    const T* other = RESIDUAL ? residual + index * residual_stride : nullptr;
    float squares = reduce_row<Sum>(variance_size, Squares<T, RESIDUAL>{from, other});
    float r = rsqrt(squares / static_cast<float>(variance_size), eps);
    if (rstd != nullptr) rstd[index] = one_nan(r);
    T* kept =
        RESIDUAL && residual_out != nullptr ? residual_out + index * residual_out_stride : nullptr;
    for_vectors(n, [=, w = weight](i64 i, i64 count) __attribute__((always_inline)) {
      f32x16 s = load_part(from + i, count);
      if constexpr (RESIDUAL) s = s + load_part(other + i, count);
      f32x16 y = s * r;
      if (w.given()) y = y * w.at(i, count);
      if (kept != nullptr) store_result(kept + i, s, count);
      store_result(to + i, y, count);
    });
  }
};

template <class T>
struct LayerNorm {
  i64 n, spatial, groups, x_stride;
  float eps;
  const T* x;
  Parameter<T> weight, bias;
  float *mean_out, *rstd_out;

  template <class Out>
  void row(i64 index, Out* to) const {
    const T* from = x + index * x_stride;
    float size = static_cast<float>(n);
    float mean = reduce_row<Sum>(n, Values<T>{from}) / size;
    float r = rsqrt(reduce_row<Sum>(n, SquaredDifferences<T>{from, mean}) / size, eps);
    if (mean_out != nullptr) mean_out[index] = one_nan(mean);
    if (rstd_out != nullptr) rstd_out[index] = one_nan(r);
    if (spatial == 0) {
      for_vectors(n, [=, w = weight, b = bias](i64 i, i64 count) __attribute__((always_inline)) {
        f32x16 y = (load_part(from + i, count) - mean) * r;
        if (w.given()) y = y * w.at(i, count);
        if (b.given()) y = y + b.at(i, count);
        store_result(to + i, y, count);
      });
      return;
    }
    i64 channels = n / spatial, first = index % groups * channels;
    bool scaled = weight.given(), shifted = bias.given();
    for (i64 channel = 0; channel < channels; ++channel) {
      const T* part = from + channel * spatial;
      Out* part_to = to + channel * spatial;
      float scale = scaled ? weight.one(first + channel) : 1.0f;
      float shift = shifted ? bias.one(first + channel) : 0.0f;
      for_vectors(spatial, [=](i64 i, i64 count) __attribute__((always_inline)) {
        f32x16 y = (load_part(part + i, count) - mean) * r;
        if (scaled) y = y * scale;
        if (shifted) y = y + shift;
        store_result(part_to + i, y, count);
      });
    }
  }
};

// g * weight.
template <class T>
struct WeightedGradient {
  const T* g;
  Parameter<T> weight;
  __attribute__((always_inline)) f32x16 operator()(i64 i, i64 count) const {
    f32x16 h = load_part(g + i, count);
    return weight.given() ? h * weight.at(i, count) : h;
  }
};

// ((x + residual) - mean) * rstd. Without a mean, +0.0 is subtracted, which changes no value.
template <class T>
struct Normalized {
  const T *x, *residual;
  float mean, rstd;
  __attribute__((always_inline)) f32x16 operator()(i64 i, i64 count) const {
    f32x16 s = load_part(x + i, count);
    if (residual != nullptr) s = s + load_part(residual + i, count);
    return (s - mean) * rstd;
  }
};

template <class T>
struct GradientProducts {
  WeightedGradient<T> h;
  Normalized<T> c;
  __attribute__((always_inline)) f32x16 operator()(i64 i, i64 count) const {
    return h(i, count) * c(i, count);
  }
};

template <class T>
struct NormBackward {
  i64 n, variance_size, g_stride, x_stride, residual_stride;
  const T *g, *x, *residual;
  const float *mean, *rstd;
  Parameter<T> weight;

  template <class Out>
  void row(i64 index, Out* to) const {
    WeightedGradient<T> h{g + index * g_stride, weight};
    Normalized<T> c{x + index * x_stride,
                    residual == nullptr ? nullptr : residual + index * residual_stride,
                    mean == nullptr ? 0.0f : mean[index], rstd[index]};
    float h_mean = mean == nullptr ? 0.0f : reduce_row<Sum>(n, h) / static_cast<float>(n);
    float projection =
        reduce_row<Sum>(n, GradientProducts<T>{h, c}) / static_cast<float>(variance_size);
    for_vectors(n, [=, v_size = variance_size](i64 i, i64 count) __attribute__((always_inline)) {
      f32x16 back = h(i, count) - h_mean;
      back = first_lanes(back - c(i, count) * projection, v_size - i, back);
      store_result(to + i, back * c.rstd, count);
    });
  }
};

// Calls `body` with the types of x and output, and whether weights are fp32 where x is not.
template <class Body>
Status with_norm_dtypes(i32 dtype, i32 weight_dtype, i32 out_dtype, Body body) {
  if (weight_dtype != dtype && weight_dtype != F32) return BAD_DTYPE;
  return with_dtypes(dtype, out_dtype, [&](auto in, auto result) -> Status {
    return body(in, result, weight_dtype != dtype);
  });
}

}  // namespace
}  // namespace bi

using namespace bi;

BI_EXPORT i32 bi_rms_norm(i32 dtype, i32 weight_dtype, i32 out_dtype, i64 rows, i64 n,
                          i64 variance_size, const void* x, i64 x_stride, const void* residual,
                          i64 residual_stride, const void* weight, double eps, void* out,
                          i64 out_stride, void* residual_out, i64 residual_out_stride, float* rstd,
                          i32 threads) {
  if (rows < 0 || n < 0 || variance_size < 0 || variance_size > n) return BAD_ARGUMENT;
  if (residual == nullptr && residual_out != nullptr) return BAD_ARGUMENT;
  return with_norm_dtypes(dtype, weight_dtype, out_dtype,
                          [&](auto in, auto result, bool wide) -> Status {
                            using T = decltype(in);
                            using Out = decltype(result);
                            RmsNorm<T> norm{n,
                                            variance_size,
                                            x_stride,
                                            residual_stride,
                                            residual_out_stride,
                                            static_cast<float>(eps),
                                            static_cast<const T*>(x),
                                            static_cast<const T*>(residual),
                                            {weight, wide},
                                            static_cast<T*>(residual_out),
                                            rstd};
                            Out* to = static_cast<Out*>(out);
                            return for_rows(threads, rows, n, [=](i64 row) {
                              if (norm.residual != nullptr) {
                                norm.template row<true>(row, to + row * out_stride);
                              } else {
                                norm.template row<false>(row, to + row * out_stride);
                              }
                            });
                          });
}

BI_EXPORT i32 bi_layer_norm(i32 dtype, i32 weight_dtype, i32 out_dtype, i64 rows, i64 n,
                            i64 spatial, i64 groups, const void* x, i64 x_stride,
                            const void* weight, const void* bias, double eps, void* out,
                            i64 out_stride, float* mean, float* rstd, i32 threads) {
  if (rows < 0 || n < 0 || spatial < 0 || (spatial > 0 && (n % spatial != 0 || groups < 1)))
    return BAD_ARGUMENT;
  return with_norm_dtypes(
      dtype, weight_dtype, out_dtype, [&](auto in, auto result, bool wide) -> Status {
        using T = decltype(in);
        using Out = decltype(result);
        LayerNorm<T> norm{n,
                          spatial,
                          groups,
                          x_stride,
                          static_cast<float>(eps),
                          static_cast<const T*>(x),
                          {weight, wide},
                          {bias, wide},
                          mean,
                          rstd};
        Out* to = static_cast<Out*>(out);
        return for_rows(threads, rows, n, [=](i64 row) { norm.row(row, to + row * out_stride); });
      });
}

BI_EXPORT i32 bi_norm_backward(i32 dtype, i32 weight_dtype, i32 out_dtype, i64 rows, i64 n,
                               i64 variance_size, const void* g, i64 g_stride, const void* x,
                               i64 x_stride, const void* residual, i64 residual_stride,
                               const float* mean, const float* rstd, const void* weight, void* out,
                               i64 out_stride, i32 threads) {
  if (rows < 0 || n < 0 || variance_size < 0 || variance_size > n) return BAD_ARGUMENT;
  if (rstd == nullptr || (mean != nullptr && variance_size != n)) return BAD_ARGUMENT;
  return with_norm_dtypes(
      dtype, weight_dtype, out_dtype, [&](auto in, auto result, bool wide) -> Status {
        using T = decltype(in);
        using Out = decltype(result);
        NormBackward<T> norm{n,
                             variance_size,
                             g_stride,
                             x_stride,
                             residual_stride,
                             static_cast<const T*>(g),
                             static_cast<const T*>(x),
                             static_cast<const T*>(residual),
                             mean,
                             rstd,
                             {weight, wide}};
        Out* to = static_cast<Out*>(out);
        return for_rows(threads, rows, n, [=](i64 row) { norm.row(row, to + row * out_stride); });
      });
}
