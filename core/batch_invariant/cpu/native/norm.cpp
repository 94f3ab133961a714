// rms_norm, layer_norm and group_norm over rows, and the gradients of their inputs.
#include "lanes.h"
#include "math.h"
#include "rows.h"

namespace bi {
namespace {

BI_INLINE float rsqrt(float mean_square, float eps) { return 1.0f / __builtin_sqrtf(mean_square + eps); }

// x, residual and residual_out share a dtype; weight and bias share theirs.
template <class T, class W, class Out>
struct RmsNorm {
  i64 n, variance_size, x_stride, residual_stride, out_stride, residual_out_stride;
  float eps;
  const T *x, *residual;
  const W* weight;
  Out* out;
  T* residual_out;
  float* rstd;

  template <bool RESIDUAL>
  void row(i64 index) const {
    const T* from = x + index * x_stride;
    const T* other = RESIDUAL ? residual + index * residual_stride : nullptr;
    auto sum = [=](i64 i, i64 count) __attribute__((always_inline)) {
      f32x16 s = load_part(from + i, count);
      if constexpr (RESIDUAL) s = s + load_part(other + i, count);
      return s;
    };
    float squares = reduce_row<Sum>(variance_size, [=](i64 i, i64 count) __attribute__((always_inline)) {
      f32x16 s = sum(i, count);
      return s * s;
    });
    float r = rsqrt(squares / static_cast<float>(variance_size), eps);
    if (rstd != nullptr) rstd[index] = one_nan(r);
    Out* to = out + index * out_stride;
    T* kept = RESIDUAL && residual_out != nullptr ? residual_out + index * residual_out_stride : nullptr;
    const W* w = weight;
    for_vectors(n, [=](i64 i, i64 count) __attribute__((always_inline)) {
      f32x16 s = sum(i, count);
      f32x16 y = s * r;
      if (w != nullptr) y = y * load_part(w + i, count);
      if (kept != nullptr) store_result(kept + i, s, count);
      store_result(to + i, y, count);
    });
  }
};

template <class T, class W, class Out>
struct LayerNorm {
  i64 n, spatial, groups, x_stride, out_stride;
  float eps;
  const T* x;
  const W *weight, *bias;
  Out* out;
  float *mean_out, *rstd_out;

  void row(i64 index) const {
    const T* from = x + index * x_stride;
    float size = static_cast<float>(n);
    float mean = reduce_row<Sum>(
        n, [=](i64 i, i64 count) __attribute__((always_inline)) { return load_part(from + i, count); }) / size;
    float squares = reduce_row<Sum>(n, [=](i64 i, i64 count) __attribute__((always_inline)) {
      f32x16 d = load_part(from + i, count) - mean;
      return d * d;
    });
    float r = rsqrt(squares / size, eps);
    if (mean_out != nullptr) mean_out[index] = one_nan(mean);
    if (rstd_out != nullptr) rstd_out[index] = one_nan(r);
    Out* to = out + index * out_stride;
    const W *w = weight, *b = bias;
    if (spatial == 0) {
      for_vectors(n, [=](i64 i, i64 count) __attribute__((always_inline)) {
        f32x16 y = (load_part(from + i, count) - mean) * r;
        if (w != nullptr) y = y * load_part(w + i, count);
        if (b != nullptr) y = y + load_part(b + i, count);
        store_result(to + i, y, count);
      });
      return;
    }
    i64 channels = n / spatial, first = index % groups * channels;
    for (i64 channel = 0; channel < channels; ++channel) {
      const T* part = from + channel * spatial;
      Out* part_to = to + channel * spatial;
      float scale = w != nullptr ? to_f32(w[first + channel]) : 1.0f;
      float shift = b != nullptr ? to_f32(b[first + channel]) : 0.0f;
      for_vectors(spatial, [=](i64 i, i64 count) __attribute__((always_inline)) {
        f32x16 y = (load_part(part + i, count) - mean) * r;
        if (w != nullptr) y = y * scale;
        if (b != nullptr) y = y + shift;
        store_result(part_to + i, y, count);
      });
    }
  }
};

template <class T, class W, class Out>
struct NormBackward {
  i64 n, variance_size, g_stride, x_stride, residual_stride, out_stride;
  const T *g, *x, *residual;
  const float *mean, *rstd;
  const W* weight;
  Out* out;

  template <bool LAYER>
  void row(i64 index) const {
    const W* w = weight;
    i64 v_size = variance_size;
    const T* gradient = g + index * g_stride;
    const T* from = x + index * x_stride;
    const T* other = residual != nullptr ? residual + index * residual_stride : nullptr;
    float r = rstd[index];
    float shift = LAYER ? mean[index] : 0.0f;
    auto weighted = [=](i64 i, i64 count) __attribute__((always_inline)) {
      f32x16 h = load_part(gradient + i, count);
      return w != nullptr ? h * load_part(w + i, count) : h;
    };
    auto centred = [=](i64 i, i64 count) __attribute__((always_inline)) {
      f32x16 v = load_part(from + i, count);
      if (other != nullptr) v = v + load_part(other + i, count);
      if constexpr (LAYER) v = v - shift;
      return v * r;
    };
    float h_mean = 0.0f;
    if constexpr (LAYER) h_mean = reduce_row<Sum>(n, weighted) / static_cast<float>(n);
    float projection = reduce_row<Sum>(n, [=](i64 i, i64 count) __attribute__((always_inline)) {
                         return weighted(i, count) * centred(i, count);
                       }) / static_cast<float>(v_size);
    Out* to = out + index * out_stride;
    for_vectors(n, [=](i64 i, i64 count) __attribute__((always_inline)) {
      f32x16 h = weighted(i, count);
      if constexpr (LAYER) {
        h = (h - h_mean) - centred(i, count) * projection;
      } else {
        h = first_lanes(h - centred(i, count) * projection, v_size - i, h);
      }
      store_result(to + i, h * r, count);
    });
  }
};

// Calls `body` with the types of x, weight and output; the weight's is x's or fp32.
template <class Body>
Status with_norm_dtypes(i32 dtype, i32 weight_dtype, i32 out_dtype, Body body) {
  return with_dtypes(dtype, out_dtype, [&](auto in, auto result) -> Status {
    if (weight_dtype == dtype) return body(in, in, result);
    if (weight_dtype == F32) return body(in, float{}, result);
    return BAD_DTYPE;
  });
}

}  // namespace
}  // namespace bi

using namespace bi;

BI_EXPORT i32 bi_rms_norm(i32 dtype, i32 weight_dtype, i32 out_dtype, i64 rows, i64 n, i64 variance_size, const void* x,
                          i64 x_stride, const void* residual, i64 residual_stride, const void* weight, double eps,
                          void* out, i64 out_stride, void* residual_out, i64 residual_out_stride, float* rstd,
                          i32 threads) {
  if (rows < 0 || n < 0 || variance_size < 0 || variance_size > n) return BAD_ARGUMENT;
  if (residual == nullptr && residual_out != nullptr) return BAD_ARGUMENT;
  return with_norm_dtypes(dtype, weight_dtype, out_dtype, [&](auto in, auto scale, auto result) -> Status {
    using T = decltype(in);
    using W = decltype(scale);
    using Out = decltype(result);
    RmsNorm<T, W, Out> norm{n,
                            variance_size,
                            x_stride,
                            residual_stride,
                            out_stride,
                            residual_out_stride,
                            static_cast<float>(eps),
                            static_cast<const T*>(x),
                            static_cast<const T*>(residual),
                            static_cast<const W*>(weight),
                            static_cast<Out*>(out),
                            static_cast<T*>(residual_out),
                            rstd};
    if (residual != nullptr) return for_rows(threads, rows, n, [=](i64 row) { norm.template row<true>(row); });
    return for_rows(threads, rows, n, [=](i64 row) { norm.template row<false>(row); });
  });
}

BI_EXPORT i32 bi_layer_norm(i32 dtype, i32 weight_dtype, i32 out_dtype, i64 rows, i64 n, i64 spatial, i64 groups,
                            const void* x, i64 x_stride, const void* weight, const void* bias, double eps, void* out,
                            i64 out_stride, float* mean, float* rstd, i32 threads) {
  if (rows < 0 || n < 0 || spatial < 0 || (spatial > 0 && (n % spatial != 0 || groups < 1))) return BAD_ARGUMENT;
  return with_norm_dtypes(dtype, weight_dtype, out_dtype, [&](auto in, auto scale, auto result) -> Status {
    using T = decltype(in);
    using W = decltype(scale);
    using Out = decltype(result);
    LayerNorm<T, W, Out> norm{n,
                              spatial,
                              groups,
                              x_stride,
                              out_stride,
                              static_cast<float>(eps),
                              static_cast<const T*>(x),
                              static_cast<const W*>(weight),
                              static_cast<const W*>(bias),
                              static_cast<Out*>(out),
                              mean,
                              rstd};
    return for_rows(threads, rows, n, [=](i64 row) { norm.row(row); });
  });
}

BI_EXPORT i32 bi_norm_backward(i32 dtype, i32 weight_dtype, i32 out_dtype, i64 rows, i64 n, i64 variance_size,
                               const void* g, i64 g_stride, const void* x, i64 x_stride, const void* residual,
                               i64 residual_stride, const float* mean, const float* rstd, const void* weight, void* out,
                               i64 out_stride, i32 threads) {
  if (rows < 0 || n < 0 || variance_size < 0 || variance_size > n) return BAD_ARGUMENT;
  if (mean != nullptr && variance_size != n) return BAD_ARGUMENT;
  return with_norm_dtypes(dtype, weight_dtype, out_dtype, [&](auto in, auto scale, auto result) -> Status {
    using T = decltype(in);
    using W = decltype(scale);
    using Out = decltype(result);
    NormBackward<T, W, Out> norm{n,
                                 variance_size,
                                 g_stride,
                                 x_stride,
                                 residual_stride,
                                 out_stride,
                                 static_cast<const T*>(g),
                                 static_cast<const T*>(x),
                                 static_cast<const T*>(residual),
                                 mean,
                                 rstd,
                                 static_cast<const W*>(weight),
                                 static_cast<Out*>(out)};
    if (mean != nullptr) return for_rows(threads, rows, n, [=](i64 row) { norm.template row<true>(row); });
    return for_rows(threads, rows, n, [=](i64 row) { norm.template row<false>(row); });
  });
}
