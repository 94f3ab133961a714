// Row operations: every entry point takes rows of n elements at unit stride, `x_stride` elements
// apart (any stride, 0 included), and writes results of `dtype` or fp32 (`out_dtype`), rounded once
// from fp32.
//
// A row's bits are a function of its own elements and of n: not of the other rows, the threads, the
// alignment or the vector width. All are portable: IEEE fp32 operations in a stated order (lanes.h:
// "lane sum"), and exp and log of math.h. A NaN result is 0x7fc00000 (rounded to the output dtype).
//
// dtypes: F32, BF16, F16. Return a Status: BAD_DTYPE for other dtypes or pairs, BAD_ARGUMENT for a
// negative size or an unknown op, OUT_OF_MEMORY. `threads` is the most threads to use. Input and
// output may be the same memory where both have one dtype and one stride; otherwise they must not
// overlap.
#pragma once
#include "types.h"

namespace bi {

enum ReduceOp : i32 {
  REDUCE_SUM = 0,           // lane sum
  REDUCE_MEAN = 1,          // lane sum / n, correctly rounded; n = 0 gives NaN
  REDUCE_PROD = 2,          // the lane order with * and 1.0 in place of + and 0.0
  REDUCE_NORM0 = 3,         // how many elements are not 0 (NaN is not 0)
  REDUCE_NORM1 = 4,         // lane sum of |x|
  REDUCE_NORM2 = 5,         // sqrt(lane sum of x^2): overflows like a plain fp32 sum of squares
  REDUCE_NORM_INF = 6,      // largest |x|, exact; NaN if there is one; 0 for n = 0
  REDUCE_NORM_NEG_INF = 7,  // smallest |x|, exact; NaN if there is one; inf for n = 0
};

enum SoftmaxOp : i32 {
  // Results of 16 bits are made of short_exp in place of exp, and of e * (1 / s) in place of e / s.
  SOFTMAX = 0,      // e / s, with e = exp(x - max), s = lane sum of e
  LOG_SOFTMAX = 1,  // (x - max) - log(lane sum of exp(x - max))
};

enum MapOp : i32 {
  MAP_EXP = 0,
  MAP_LOG = 1,
  MAP_TANH = 2,
  MAP_MINUS_LOG1M = 3,
  MAP_SHORT_EXP = 4,
};

enum SelectOp : i32 {
  LARGEST =
      0,  // descending, NaN above all numbers, +0 equals -0, equals in ascending order of index
  SMALLEST = 1,  // ascending, NaN above all numbers (so last), equals in ascending order of index
};

}  // namespace bi

// out [rows].
BI_EXPORT bi::i32 bi_row_reduce(bi::i32 op, bi::i32 dtype, bi::i32 out_dtype, bi::i64 rows,
                                bi::i64 n, const void* x, bi::i64 x_stride, void* out,
                                bi::i32 threads);

// out [rows] = v or, with take_sqrt, sqrt(v), where v = lane sum of (x - mean)^2 / max(0, n -
// correction) and mean = lane sum / n; mean_out [rows] may be null.
BI_EXPORT bi::i32 bi_row_var(bi::i32 take_sqrt, bi::i32 dtype, bi::i32 out_dtype, bi::i64 rows,
                             bi::i64 n, const void* x, bi::i64 x_stride, double correction,
                             void* out, void* mean_out, bi::i32 threads);

// out [rows, n], `out_stride` apart.
BI_EXPORT bi::i32 bi_row_softmax(bi::i32 op, bi::i32 dtype, bi::i32 out_dtype, bi::i64 rows,
                                 bi::i64 n, const void* x, bi::i64 x_stride, void* out,
                                 bi::i64 out_stride, bi::i32 threads);

// out [rows] = m + log(lane sum of exp(x - m)), m = max, or 0 if that is infinite, as in torch.
BI_EXPORT bi::i32 bi_row_logsumexp(bi::i32 dtype, bi::i32 out_dtype, bi::i64 rows, bi::i64 n,
                                   const void* x, bi::i64 x_stride, void* out, bi::i32 threads);

// The gradient of the input, given the op's result y and its gradient g (both of `dtype`):
//   SOFTMAX: (g - lane sum of g*y) * y        LOG_SOFTMAX: g - exp(y) * lane sum of g
BI_EXPORT bi::i32 bi_row_softmax_backward(bi::i32 op, bi::i32 dtype, bi::i32 out_dtype,
                                          bi::i64 rows, bi::i64 n, const void* g, bi::i64 g_stride,
                                          const void* y, bi::i64 y_stride, void* out,
                                          bi::i64 out_stride, bi::i32 threads);

// s = x + residual (fp32, not rounded further), r = 1 / sqrt(lane sum of s^2 over the first
// variance_size columns / variance_size + eps), out = (s * r) * weight, residual_out = s. residual,
// residual_out (dtype), weight [n] (weight_dtype: dtype or F32) and rstd [rows] (fp32, = r) may be
// null.
BI_EXPORT bi::i32 bi_rms_norm(bi::i32 dtype, bi::i32 weight_dtype, bi::i32 out_dtype, bi::i64 rows,
                              bi::i64 n, bi::i64 variance_size, const void* x, bi::i64 x_stride,
                              const void* residual, bi::i64 residual_stride, const void* weight,
                              double eps, void* out, bi::i64 out_stride, void* residual_out,
                              bi::i64 residual_out_stride, float* rstd, bi::i32 threads);

// mean = lane sum / n, d = x - mean, r = 1 / sqrt(lane sum of d^2 / n + eps), out = (d * r) *
// weight + bias, each operation rounded. weight and bias (weight_dtype: dtype or F32) and mean and
// rstd [rows] (fp32) may be null. With spatial = 0 weight and bias are [n]. With spatial > 0 (group
// norm: a row is one group of one sample, channels x spatial) element j of row i uses entry (i mod
// groups) * (n / spatial) + j / spatial.
BI_EXPORT bi::i32 bi_layer_norm(bi::i32 dtype, bi::i32 weight_dtype, bi::i32 out_dtype,
                                bi::i64 rows, bi::i64 n, bi::i64 spatial, bi::i64 groups,
                                const void* x, bi::i64 x_stride, const void* weight,
                                const void* bias, double eps, void* out, bi::i64 out_stride,
                                float* mean, float* rstd, bi::i32 threads);

// The gradient of x (not of the weights), given that of the output; h = g * weight, and
//   layer: c = (x - mean) * rstd, dx = rstd * ((h - lane sum of h / n) - c * (lane sum of h*c / n))
//   rms:   c = s * rstd,          dx = rstd * (h - c * (lane sum of h*c / variance_size)), the
//   second term in
//          the first variance_size columns only, with s = x + residual (residual may be null)
// each operation rounded. mean, rstd [rows] (fp32) as the forward gave them; mean = null means rms.
BI_EXPORT bi::i32 bi_norm_backward(bi::i32 dtype, bi::i32 weight_dtype, bi::i32 out_dtype,
                                   bi::i64 rows, bi::i64 n, bi::i64 variance_size, const void* g,
                                   bi::i64 g_stride, const void* x, bi::i64 x_stride,
                                   const void* residual, bi::i64 residual_stride, const float* mean,
                                   const float* rstd, const void* weight, void* out,
                                   bi::i64 out_stride, bi::i32 threads);

// out[i] = x[0] + ... + x[i]: one serial fp32 chain from +0.0, each prefix rounded to out_dtype on
// its own.
BI_EXPORT bi::i32 bi_row_cumsum(bi::i32 dtype, bi::i32 out_dtype, bi::i64 rows, bi::i64 n,
                                const void* x, bi::i64 x_stride, void* out, bi::i64 out_stride,
                                bi::i32 threads);

// The first k elements in the order of `op`, and where they are: values [rows, k] (dtype, the
// input's bits) and indices [rows, k] are contiguous; values may be null. 0 <= k <= n < 2^32.
BI_EXPORT bi::i32 bi_row_topk(bi::i32 op, bi::i32 dtype, bi::i64 rows, bi::i64 n, bi::i64 k,
                              const void* x, bi::i64 x_stride, void* values, bi::i64* indices,
                              bi::i32 threads);

// indices [rows]: where the first element in the order of `op` is, but with NaN before all numbers
// for SMALLEST too, as torch's argmin has it. n >= 1.
BI_EXPORT bi::i32 bi_row_argmax(bi::i32 op, bi::i32 dtype, bi::i64 rows, bi::i64 n, const void* x,
                                bi::i64 x_stride, bi::i64* indices, bi::i32 threads);

// out [rows]: the column that each contiguous row draws, ops/sample.py says how; -1 if it has a NaN or
// nothing above -inf. keep [rows, n] (0: not drawn) and min_p [rows] may be null. 1 <= n < 2^31.
BI_EXPORT bi::i32 bi_row_sample(bi::i32 dtype, bi::i64 rows, bi::i64 n, const void* x,
                                const bi::i64* seeds, const bi::i64* positions,
                                const float* temperature, const float* min_p, const bi::u8* keep,
                                bi::i64* out, bi::i32 threads);

// out [rows, n]: exp((x - top) / temperature) in units of 2^-40, cut off, for contiguous rows whose
// first element is the top; 0 for NaN.
BI_EXPORT bi::i32 bi_sample_weights(bi::i32 dtype, bi::i64 rows, bi::i64 n, const void* x,
                                    const float* temperature, bi::i64* out, bi::i32 threads);

// out[i] = a function of math.h of x[i], for n fp32 values.
BI_EXPORT bi::i32 bi_map(bi::i32 op, bi::i64 n, const float* x, float* out, bi::i32 threads);

// The same functions as bi_row_reduce, bi_row_var and bi_row_cumsum, with the same bits, over the
// middle dimension of x [outer, n, inner]: `outer_stride` and `stride` elements apart, `inner` at
// unit stride. out (and mean_out) are contiguous: [outer, inner], of cumsum [outer, n, inner].
BI_EXPORT bi::i32 bi_column_reduce(bi::i32 op, bi::i32 dtype, bi::i32 out_dtype, bi::i64 outer,
                                   bi::i64 n, bi::i64 inner, const void* x, bi::i64 outer_stride,
                                   bi::i64 stride, void* out, bi::i32 threads);
BI_EXPORT bi::i32 bi_column_var(bi::i32 take_sqrt, bi::i32 dtype, bi::i32 out_dtype, bi::i64 outer,
                                bi::i64 n, bi::i64 inner, const void* x, bi::i64 outer_stride,
                                bi::i64 stride, double correction, void* out, void* mean_out,
                                bi::i32 threads);
BI_EXPORT bi::i32 bi_column_cumsum(bi::i32 dtype, bi::i32 out_dtype, bi::i64 outer, bi::i64 n,
                                   bi::i64 inner, const void* x, bi::i64 outer_stride,
                                   bi::i64 stride, void* out, bi::i32 threads);
