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
#include "partial.h"

namespace bi {

constexpr i64 LANES = 1024;
constexpr i64 SEGMENT = 8192;

constexpr float QUIET_NAN = __builtin_nanf("");  // 0x7fc00000: the one NaN that a kernel writes

// Which payload and sign a NaN carries differs between CPUs and operand orders, so results get this one.
BI_INLINE f32x16 one_nan(f32x16 x) { return x == x ? x : splat(QUIET_NAN); }
BI_INLINE float one_nan(float x) { return x == x ? x : QUIET_NAN; }

template <class T>
BI_INLINE void store_result(T* to, f32x16 x, i64 count = 16) {
  store_part(to, one_nan(x), count);
}
template <class T>
BI_INLINE void store_result(T* to, float x) {
  store_part(to, one_nan(splat(x)), 1);
}

// The first `count` lanes of x and the other lanes of `others`; any count.
BI_INLINE f32x16 first_lanes(f32x16 x, i64 count, f32x16 others) {
  constexpr i32x16 index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return index < static_cast<i32>(max(min(count, 16), 0)) ? x : others;
}
BI_INLINE f32x16 first_lanes(f32x16 x, i64 count, float others) { return first_lanes(x, count, splat(others)); }

// A total starts with its first term instead of the identity. For sums that differs only where all terms
// are -0.0, and `finish` makes that +0.0 again.
struct Sum {
  static constexpr float identity = 0.0f;
  template <class V>
  BI_INLINE V combine(V a, V b) { return a + b; }
  BI_INLINE float finish(float total) { return total + 0.0f; }
};
struct Product {
  static constexpr float identity = 1.0f;
  template <class V>
  BI_INLINE V combine(V a, V b) { return a * b; }
  BI_INLINE float finish(float total) { return total; }
};

// Applies `body(i, count)` to 0 <= i < n in vectors of 16; the last count may be smaller.
template <class Body>
BI_INLINE void for_vectors(i64 n, Body body) {
  i64 i = 0;
  for (; i + 16 <= n; i += 16) body(i, i64{16});
  if (i < n) body(i, n - i);
}

// Reads elements i.. of a row: 16, or fewer at its end, where the identity fills up.
template <class Op, class At>
BI_INLINE f32x16 terms(At& at, i64 i, i64 end) {
  i64 left = end - i;
  return left >= 16 ? at(i, i64{16}) : first_lanes(at(i, left), left, Op::identity);
}

// The total of lanes i..i+16 of the segment that ends at `end`.
template <class Op, class At>
BI_INLINE f32x16 lane_chain(At& at, i64 i, i64 end) {
  if (i + LANES >= end) return terms<Op>(at, i, end);
  f32x16 total = at(i, i64{16});
  for (i += LANES; i + 16 <= end; i += LANES) total = Op::combine(total, at(i, i64{16}));
  return i < end ? Op::combine(total, terms<Op>(at, i, end)) : total;
}

// Writes the lanes of elements begin..end, which lie in one segment, in whole vectors: as many as hold
// elements. Reads the row from front to back, which memory likes best.
template <class Op, class At>
BI_INLINE void segment_lanes(i64 begin, i64 end, float* lanes, At& at) {
  i64 first = min(end, begin + LANES);
  for (i64 i = begin; i < first; i += 16) store(lanes + (i - begin), terms<Op>(at, i, end));
  for (i64 chunk = begin + LANES; chunk < end; chunk += LANES) {
    i64 stop = min(end, chunk + LANES);
    for (i64 i = chunk; i < stop; i += 16) {
      float* lane = lanes + (i - chunk);
      store(lane, Op::combine(load<f32x16>(lane), terms<Op>(at, i, end)));
    }
  }
}

// Adds the lanes of the next segment, of `length` elements, to those of the segments before it.
template <class Op>
BI_INLINE void add_lanes(float* total, const float* next, i64 length) {
  for (i64 i = 0; i < min(length, LANES); i += 16) {
    store(total + i, Op::combine(load<f32x16>(total + i), load<f32x16>(next + i)));
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
  return Op::finish(Op::combine(c, Op::combine(b[1], b[3])));
}

// Folds COUNT vectors (a power of two) to one by halves, starting with FIRST and every STEP-th after it.
template <class Op, int COUNT, int FIRST = 0, int STEP = 1>
BI_INLINE f32x16 fold_vectors(const float* lanes) {
  if constexpr (STEP == COUNT) {
    return load<f32x16>(lanes + 16 * FIRST);
  } else {
    return Op::combine(fold_vectors<Op, COUNT, FIRST, 2 * STEP>(lanes),
                       fold_vectors<Op, COUNT, FIRST + STEP, 2 * STEP>(lanes));
  }
}

// Folds the first `count` lanes by halves; count is a power of two from 16 to LANES / 2.
template <class Op>
BI_INLINE float fold_lanes(const float* lanes, i64 count) {
  switch (count / 16) {
    case 1: return fold_vector<Op>(load<f32x16>(lanes));
    case 2: return fold_vector<Op>(fold_vectors<Op, 2>(lanes));
    case 4: return fold_vector<Op>(fold_vectors<Op, 4>(lanes));
    case 8: return fold_vector<Op>(fold_vectors<Op, 8>(lanes));
    case 16: return fold_vector<Op>(fold_vectors<Op, 16>(lanes));
    default: return fold_vector<Op>(fold_vectors<Op, 32>(lanes));
  }
}

// The first fold of a full set of lanes, for rows that fill them, and the others.
template <class Op>
BI_INLINE float fold_all_lanes(float* lanes) {
  for (i64 i = 0; i < LANES / 2; i += 16) {
    store(lanes + i, Op::combine(load<f32x16>(lanes + i), load<f32x16>(lanes + i + LANES / 2)));
  }
  return fold_lanes<Op>(lanes, LANES / 2);
}

// The whole order over one row, on one thread. `at(i, count)` gives elements i.. of the row as fp32, in
// vectors of 16; it is called once for each vector, and may have effects.
template <class Op, class At>
BI_INLINE float reduce_row(i64 n, At at) {
  if (n <= 0) return Op::identity;
  alignas(64) float lanes[LANES];
  if (n > SEGMENT) {
    alignas(64) float next[LANES];
    segment_lanes<Op>(0, SEGMENT, lanes, at);
    for (i64 begin = SEGMENT; begin < n; begin += SEGMENT) {
      i64 end = min(begin + SEGMENT, n);
      segment_lanes<Op>(begin, end, next, at);
      add_lanes<Op>(lanes, next, end - begin);
    }
    return fold_all_lanes<Op>(lanes);
  }
  // One segment: each lane's total is kept in a register and folded once before it is written.
  i64 width = min(n, LANES);
  i64 half = width <= 16 ? 16 : i64{1} << (63 - __builtin_clzll(static_cast<u64>(width - 1)));
  i64 i = 0;
  if (n <= LANES) {
    for (; i + half + 16 <= n; i += 16) store(lanes + i, Op::combine(at(i, i64{16}), at(i + half, i64{16})));
    if (i + half < n) {
      store(lanes + i, Op::combine(at(i, i64{16}), terms<Op>(at, i + half, n)));
      i += 16;
    }
    for (; i + 16 <= min(half, n); i += 16) store(lanes + i, at(i, i64{16}));
    if (i < min(half, n)) store(lanes + i, terms<Op>(at, i, n));
  } else {
    for (; i < half; i += 16) {
      store(lanes + i, Op::combine(lane_chain<Op>(at, i, n), lane_chain<Op>(at, i + half, n)));
    }
  }
  return fold_lanes<Op>(lanes, half);
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
