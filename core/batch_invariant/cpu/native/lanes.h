// The one order in which a row is added up (or multiplied), and how rows become tasks.
//
// A row of n elements is cut into segments of SEGMENT. Inside a segment, lane i (of LANES) starts at +0.0
// and adds elements i, i + LANES, i + 2 LANES, ... one after another; the segments' lanes are added lane by
// lane in ascending order of the segments; then the lanes are folded by halves, first half + second half,
// until one is left. Missing elements are +0.0. Every addition is rounded to fp32, and what is added (a
// square, a product, an exponential) is rounded before.
//
// A lane is never -0.0, so adding a missing +0.0 changes nothing: it is skipped here, and a row of fewer
// than LANES elements gives the same bits with the next power of two as the number of lanes.
// ops/row_order.py says the same in plain torch.
#pragma once
#include "parallel.h"
#include "simd.h"

namespace bi {

constexpr i64 LANES = 1024;
constexpr i64 SEGMENT = 8192;

constexpr float QUIET_NAN = __builtin_nanf("");  // 0x7fc00000: the one NaN that a kernel writes

// Which payload and sign a NaN carries differs between CPUs and operand orders, so results get this one.
BI_INLINE f32x16 one_nan(f32x16 x) { return x == x ? x : splat(QUIET_NAN); }
BI_INLINE float one_nan(float x) { return x == x ? x : QUIET_NAN; }

template <class T>
BI_INLINE void store_result(T* to, f32x16 x, i64 count = 16) {
  store_f32(to, one_nan(x), count);
}
template <class T>
BI_INLINE void store_result(T* to, float x) {
  store_f32(to, one_nan(splat(x)), 1);
}

// The first `count` lanes of x and the other lanes of `others`; any count.
BI_INLINE f32x16 first_lanes(f32x16 x, i64 count, f32x16 others) {
  constexpr i32x16 index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return index < static_cast<i32>(max(min(count, 16), 0)) ? x : others;
}
BI_INLINE f32x16 first_lanes(f32x16 x, i64 count, float others) { return first_lanes(x, count, splat(others)); }

struct Sum {
  static constexpr float identity = 0.0f;
  template <class V>
  BI_INLINE V combine(V a, V b) { return a + b; }
};
struct Product {
  static constexpr float identity = 1.0f;
  template <class V>
  BI_INLINE V combine(V a, V b) { return a * b; }
};

// Applies `body(i, count)` to 0 <= i < n in vectors of 16; the last count may be smaller.
template <class Body>
BI_INLINE void for_vectors(i64 n, Body body) {
  i64 i = 0;
  for (; i + 16 <= n; i += 16) body(i, i64{16});
  if (i < n) body(i, n - i);
}

// The lanes of elements begin..end, which lie in one segment. `at(i, count)` gives elements i.. as fp32.
// Writes whole vectors of `lanes`: as many as hold elements. With `more`, adds to what is there.
template <class Op, class At>
BI_INLINE void segment_lanes(i64 begin, i64 end, bool more, float* lanes, At at) {
  constexpr i64 BLOCK = 64;
  for (i64 lane = 0; lane < LANES && begin + lane < end; lane += BLOCK) {
    f32x16 total[4];
    for (auto& t : total) t = splat(Op::identity);
    i64 i = begin + lane;
    for (; i + BLOCK <= end; i += LANES) {
      for (i64 j = 0; j < 4; ++j) total[j] = Op::combine(total[j], at(i + 16 * j, i64{16}));
    }
    for (i64 j = 0; j < 4; ++j) {
      i64 left = end - (i + 16 * j);
      if (left >= 16) {
        total[j] = Op::combine(total[j], at(i + 16 * j, i64{16}));
      } else if (left > 0) {
        f32x16 tail = first_lanes(at(i + 16 * j, left), left, Op::identity);
        total[j] = Op::combine(total[j], tail);
      }
      float* to = lanes + lane + 16 * j;
      if (begin + lane + 16 * j < end) store(to, more ? Op::combine(load<f32x16>(to), total[j]) : total[j]);
    }
  }
}

template <class Op>
BI_INLINE float fold_vector(f32x16 v) {
  typedef float f32x8 __attribute__((vector_size(32)));
  typedef float f32x4 __attribute__((vector_size(16)));
  f32x8 a = Op::combine(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                        __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  f32x4 b = Op::combine(__builtin_shufflevector(a, a, 0, 1, 2, 3), __builtin_shufflevector(a, a, 4, 5, 6, 7));
  float c = Op::combine(b[0], b[2]);
  return Op::combine(c, Op::combine(b[1], b[3]));
}

// Folds the lanes of a row of n > 0 elements by halves. Uses `lanes` up.
template <class Op>
BI_INLINE float fold_lanes(float* lanes, i64 n) {
  i64 used = round_up(min(n, LANES), 16);
  for (i64 half = LANES / 2; half >= 16; half /= 2) {
    for (i64 i = 0; i + half < used; i += 16) {
      store(lanes + i, Op::combine(load<f32x16>(lanes + i), load<f32x16>(lanes + i + half)));
    }
    used = min(used, half);
  }
  return fold_vector<Op>(load<f32x16>(lanes));
}

// The whole order over one row, on one thread.
template <class Op, class At>
BI_INLINE float reduce_row(i64 n, At at) {
  if (n <= 16) {
    return n <= 0 ? Op::identity
                  : fold_vector<Op>(Op::combine(splat(Op::identity), first_lanes(at(i64{0}, n), n, Op::identity)));
  }
  alignas(64) float lanes[LANES];
  for (i64 begin = 0; begin < n; begin += SEGMENT) {
    segment_lanes<Op>(begin, min(begin + SEGMENT, n), begin > 0, lanes, at);
  }
  return fold_lanes<Op>(lanes, n);
}

// Below this many elements, waking a second thread costs more than it saves.
constexpr i64 WORTH_A_THREAD = 32768;

// Runs `body(begin, end)` over ranges of rows, on several threads when there is enough to do.
template <class Body>
inline Status for_row_ranges(int threads, i64 rows, i64 n, Body body) {
  i64 elements = rows * max(n, 1);
  if (elements < WORTH_A_THREAD) threads = 1;
  i64 tasks = threads <= 1 ? 1 : min(rows, max(threads, min(4 * threads, elements / WORTH_A_THREAD)));
  return parallel_for(threads, tasks,
                      [&](i64 task) -> Status { return body(rows * task / tasks, rows * (task + 1) / tasks); });
}

template <class Body>
inline Status for_rows(int threads, i64 rows, i64 n, Body body) {
  return for_row_ranges(threads, rows, n, [&](i64 begin, i64 end) -> Status {
    for (i64 row = begin; row < end; ++row) body(row);
    return OK;
  });
}

// Calls `body` with a value of the storage type that a dtype code names.
template <class Body>
inline Status with_dtype(i32 dtype, Body body) {
  switch (dtype) {
    case F32: return body(float{});
    case BF16: return body(bf16{});
    case F16: return body(f16{});
  }
  return BAD_DTYPE;
}

// The same for an input and an output type; the output is the input's type or fp32.
template <class Body>
inline Status with_dtypes(i32 dtype, i32 out_dtype, Body body) {
  return with_dtype(dtype, [&](auto in) -> Status {
    if (out_dtype == dtype) return body(in, in);
    if (out_dtype == F32) return body(in, float{});
    return BAD_DTYPE;
  });
}

}  // namespace bi
