// Reductions and running sums over a dimension that is not the last: 64 columns at a time, each in
// the order of lanes.h, without a transposed copy.
#include "lanes.h"
#include "math.h"
#include "rows.h"
#include "terms.h"

namespace bi {
namespace {

constexpr i64 VECTORS = 4, BLOCK = 16 * VECTORS;  // columns of one task

struct Columns {
  f32x16 v[VECTORS];
};

struct LargestMagnitude {
  template <class V>
  BI_INLINE V combine(V a, V b) {
    return ((b > a) | (b != b)) ? b : a;  // a NaN stays
  }
};
struct SmallestMagnitude {
  template <class V>
  BI_INLINE V combine(V a, V b) {
    return ((b < a) | (b != b)) ? b : a;
  }
};

// What is added up, of the elements v in the columns of vector j.
struct Value {
  __attribute__((always_inline)) f32x16 operator()(f32x16 v, i64) const { return v; }
};
struct Magnitude {
  __attribute__((always_inline)) f32x16 operator()(f32x16 v, i64) const { return magnitude(v); }
};
struct NonZero {
  __attribute__((always_inline)) f32x16 operator()(f32x16 v, i64) const {
    return v != 0.0f ? splat(1.0f) : splat(0.0f);
  }
};
struct Square {
  __attribute__((always_inline)) f32x16 operator()(f32x16 v, i64) const { return v * v; }
};
struct SquaredDifference {
  const Columns& mean;
  __attribute__((always_inline)) f32x16 operator()(f32x16 v, i64 j) const {
    f32x16 d = v - mean.v[j];
    return d * d;
  }
};

// `width` columns of n elements, `stride` apart; the columns are next to each other.
template <class T>
struct Block {
  const T* x;
  i64 n, stride, width;
};

template <class Term, class T>
BI_INLINE Columns row_terms(const Block<T>& block, i64 i, const Term& term) {
  const T* row = block.x + i * block.stride;
  Columns c;
  if (block.width == BLOCK) {
    for (i64 j = 0; j < VECTORS; ++j) c.v[j] = term(load_f32(row + 16 * j), j);
  } else {
    for (i64 j = 0; j < VECTORS; ++j) {
      i64 left = block.width - 16 * j;
      c.v[j] = left > 0 ? term(load_part(row + 16 * j, left), j) : f32x16{};
    }
  }
  return c;
}

// The lanes of a column come from far apart, which the hardware does not foresee.
template <class T>
BI_INLINE void ask_for(const Block<T>& block, i64 i) {
  const char* p = reinterpret_cast<const char*>(block.x + i * block.stride);
  for (i64 byte = 0; byte < BLOCK * static_cast<i64>(sizeof(T)); byte += 64)
    __builtin_prefetch(p + byte);
}

template <class Op>
BI_INLINE void add(Columns& total, const Columns& next) {
  for (i64 j = 0; j < VECTORS; ++j) total.v[j] = Op::combine(total.v[j], next.v[j]);
}

// One lane of the block: elements i, i + LANES, ... of each segment, and the segments in order.
template <class Op, class Term, class T>
BI_INLINE Columns lane(const Block<T>& block, i64 i, const Term& term) {
  Columns total;
  for (i64 begin = 0; begin + i < block.n; begin += SEGMENT) {
    i64 end = min(begin + SEGMENT, block.n);
    Columns part = row_terms(block, begin + i, term);
    for (i64 k = begin + i + LANES; k < end; k += LANES) add<Op>(part, row_terms(block, k, term));
    if (begin == 0) {
      total = part;
    } else {
      add<Op>(total, part);
    }
  }
  return total;
}

// The columns' totals. Lanes come in the order in which the folds by halves need them, so that only
// one partial result for each fold is kept.
template <class Op, class Term, class T>
__attribute__((noinline)) void reduce_block(Block<T> block, Term term, Columns& result) {
  i64 width = min(block.n, LANES);
  if (width == 1) {
    result = lane<Op>(block, 0, term);
    return;
  }
  int folds = 63 - __builtin_clzll(static_cast<u64>(width - 1));
  i64 half = i64{1} << folds;
  Columns waiting[11];
  i64 depth = 0;
  constexpr i64 AHEAD = 4;
  auto index = [=](i64 turn) __attribute__((always_inline)) {
    return folds == 0
               ? 0
               : static_cast<i64>(__builtin_bitreverse64(static_cast<u64>(turn)) >> (64 - folds));
  };
  for (i64 turn = 0; turn < half; ++turn) {
    i64 later = index(min(turn + AHEAD, half - 1));
    ask_for(block, later);
    ask_for(block, later + half);
    i64 i = index(turn);
    Columns total = lane<Op>(block, i, term);
    if (i + half < width) add<Op>(total, lane<Op>(block, i + half, term));
    for (i64 bits = turn; bits & 1; bits >>= 1) {
      Columns first = waiting[--depth];
      add<Op>(first, total);
      total = first;
    }
    waiting[depth++] = total;
  }
  result = waiting[0];
}

// Calls `body(outer index, first column, width)` for every block of columns.
template <class Body>
Status for_blocks(int threads, i64 outer, i64 n, i64 inner, Body body) {
  i64 blocks = ceil_div(inner, BLOCK);
  return for_rows(threads, outer * blocks, n * min(inner, BLOCK), [=](i64 task) {
    i64 column = task % blocks * BLOCK;
    body(task / blocks, column, min(BLOCK, inner - column));
  });
}

template <class Out, class F>
BI_INLINE void store_columns(Out* to, const Columns& c, i64 width, F f) {
  for (i64 j = 0; 16 * j < width; ++j)
    store_result(to + 16 * j, f(c.v[j]), min(width - 16 * j, 16));
}

BI_INLINE f32x16 root(f32x16 v) { return __builtin_elementwise_sqrt(v); }

template <class T, class Out>
Status reduce_columns(i32 op, i64 outer, i64 n, i64 inner, const T* x, i64 outer_stride, i64 stride,
                      Out* out, int threads) {
  if (op < REDUCE_SUM || op > REDUCE_NORM_NEG_INF) return BAD_ARGUMENT;
  float size = static_cast<float>(n);
  return for_blocks(threads, outer, n, inner, [=](i64 o, i64 column, i64 width) {
    Block<T> block{x + o * outer_stride + column, n, stride, width};
    Out* to = out + o * inner + column;
    Columns c;
    auto plain = [](f32x16 v) __attribute__((always_inline)) { return v; };
    auto positive_zero = [](f32x16 v) __attribute__((always_inline)) { return v + 0.0f; };
    if (n == 0) {
      float empty = op == REDUCE_PROD           ? 1.0f
                    : op == REDUCE_MEAN         ? QUIET_NAN
                    : op == REDUCE_NORM_NEG_INF ? INFINITY_F32
                                                : 0.0f;
      for (auto& v : c.v) v = splat(empty);
      return store_columns(to, c, width, plain);
    }
    switch (op) {
      case REDUCE_SUM:
        reduce_block<Sum>(block, Value{}, c);
        return store_columns(to, c, width, positive_zero);
      case REDUCE_MEAN:
        reduce_block<Sum>(block, Value{}, c);
        return store_columns(to, c, width, [=](f32x16 v) __attribute__((always_inline)) {
          return (v + 0.0f) / size;
        });
      case REDUCE_PROD:
        reduce_block<Product>(block, Value{}, c);
        return store_columns(to, c, width, plain);
      case REDUCE_NORM0:
        reduce_block<Sum>(block, NonZero{}, c);
        return store_columns(to, c, width, plain);
      case REDUCE_NORM1:
        reduce_block<Sum>(block, Magnitude{}, c);
        return store_columns(to, c, width, plain);
      case REDUCE_NORM2:
        reduce_block<Sum>(block, Square{}, c);
        return store_columns(to, c, width,
                             [](f32x16 v) __attribute__((always_inline)) { return root(v); });
      case REDUCE_NORM_INF:
        reduce_block<LargestMagnitude>(block, Magnitude{}, c);
        return store_columns(to, c, width, plain);
      default:
        reduce_block<SmallestMagnitude>(block, Magnitude{}, c);
        return store_columns(to, c, width, plain);
    }
  });
}

template <class T, class Out>
Status column_variance(bool take_sqrt, i64 outer, i64 n, i64 inner, const T* x, i64 outer_stride,
                       i64 stride, float divisor, Out* out, Out* mean_out, int threads) {
  float size = static_cast<float>(n);
  return for_blocks(threads, outer, n, inner, [=](i64 o, i64 column, i64 width) {
    Block<T> block{x + o * outer_stride + column, n, stride, width};
    Columns mean, squares;
    if (n == 0) {
      for (auto& v : mean.v) v = splat(QUIET_NAN);
      squares = mean;
    } else {
      reduce_block<Sum>(block, Value{}, mean);
      for (auto& v : mean.v) v = (v + 0.0f) / size;
      reduce_block<Sum>(block, SquaredDifference{mean}, squares);
    }
    i64 to = o * inner + column;
    store_columns(out + to, squares, width, [=](f32x16 v) __attribute__((always_inline)) {
      return take_sqrt ? root(v / divisor) : v / divisor;
    });
    if (mean_out != nullptr) {
      store_columns(mean_out + to, mean, width,
                    [](f32x16 v) __attribute__((always_inline)) { return v; });
    }
  });
}

}  // namespace
}  // namespace bi

using namespace bi;

BI_EXPORT i32 bi_column_reduce(i32 op, i32 dtype, i32 out_dtype, i64 outer, i64 n, i64 inner,
                               const void* x, i64 outer_stride, i64 stride, void* out,
                               i32 threads) {
  if (outer < 0 || n < 0 || inner < 0) return BAD_ARGUMENT;
  return with_dtypes(dtype, out_dtype, [&](auto in, auto result) -> Status {
    using T = decltype(in);
    using Out = decltype(result);
    return reduce_columns(op, outer, n, inner, static_cast<const T*>(x), outer_stride, stride,
                          static_cast<Out*>(out), threads);
  });
}

BI_EXPORT i32 bi_column_var(i32 take_sqrt, i32 dtype, i32 out_dtype, i64 outer, i64 n, i64 inner,
                            const void* x, i64 outer_stride, i64 stride, double correction,
                            void* out, void* mean_out, i32 threads) {
  if (outer < 0 || n < 0 || inner < 0) return BAD_ARGUMENT;
  float divisor = static_cast<float>(static_cast<double>(n) - correction);
  if (!(divisor > 0.0f)) divisor = 0.0f;
  return with_dtypes(dtype, out_dtype, [&](auto in, auto result) -> Status {
    using T = decltype(in);
    using Out = decltype(result);
    return column_variance(take_sqrt != 0, outer, n, inner, static_cast<const T*>(x), outer_stride,
                           stride, divisor, static_cast<Out*>(out), static_cast<Out*>(mean_out),
                           threads);
  });
}

BI_EXPORT i32 bi_column_cumsum(i32 dtype, i32 out_dtype, i64 outer, i64 n, i64 inner, const void* x,
                               i64 outer_stride, i64 stride, void* out, i32 threads) {
  if (outer < 0 || n < 0 || inner < 0) return BAD_ARGUMENT;
  return with_dtypes(dtype, out_dtype, [&](auto in, auto result) -> Status {
    using T = decltype(in);
    using Out = decltype(result);
    const T* from = static_cast<const T*>(x);
    Out* to = static_cast<Out*>(out);
    return for_blocks(threads, outer, n, inner, [=](i64 o, i64 column, i64 width) {
      Block<T> block{from + o * outer_stride + column, n, stride, width};
      Columns total = {};
      for (i64 i = 0; i < n; ++i) {
        add<Sum>(total, row_terms(block, i, Value{}));
        store_columns(to + (o * n + i) * inner + column, total, width,
                      [](f32x16 v) __attribute__((always_inline)) { return v; });
      }
    });
  });
}
