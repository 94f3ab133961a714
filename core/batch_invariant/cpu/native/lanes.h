// The one order in which a row is added up (or multiplied), and how rows become tasks.
//
// A row of n elements is cut into segments of SEGMENT. Inside a segment, lane i (of LANES) starts
// at +0.0 and adds elements i, i + LANES, i + 2 LANES, ... one after another; the segments' lanes
// are added lane by lane in ascending order of the segments; then the lanes are folded by halves,
// first half + second half, until one is left. Missing elements are +0.0. Every addition is rounded
// to fp32, and what is added (a square, a product, an exponential) is rounded before.
//
// A lane is never -0.0, so adding a missing +0.0 changes nothing: it is skipped here, and a row of
// fewer than LANES elements gives the same bits with the next power of two as the number of lanes.
// ops/row_order.py says the same in plain torch.
#pragma once
#include "parallel.h"
#include "partial.h"

namespace bi {

constexpr i64 LANES = 1024;
constexpr i64 SEGMENT = 8192;

constexpr float QUIET_NAN = __builtin_nanf("");  // 0x7fc00000: the one NaN that a kernel writes

// Sign and payload of a NaN differ between CPUs and orders of operands, so results get this one.
BI_INLINE f32x16 one_nan(f32x16 x) { return x == x ? x : splat(QUIET_NAN); }
BI_INLINE float one_nan(float x) { return x == x ? x : QUIET_NAN; }

template <class T>
BI_INLINE void store_result(T* to, f32x16 x, i64 count = 16) {
  store_part(to, one_nan(x), count);
}
template <class T>
BI_INLINE void store_result(T* to, float x) {
  store_one(to, one_nan(x));
}

// The first `count` lanes of x and the other lanes of `others`; any count.
BI_INLINE f32x16 first_lanes(f32x16 x, i64 count, f32x16 others) {
  constexpr i32x16 index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return index < static_cast<i32>(max(min(count, 16), 0)) ? x : others;
}
BI_INLINE f32x16 first_lanes(f32x16 x, i64 count, float others) {
  return first_lanes(x, count, splat(others));
}

// A total starts with its first term instead of the identity. For sums that differs only where all
// terms are -0.0, and `finish` makes that +0.0 again.
struct Sum {
  static constexpr float identity = 0.0f;
  template <class V>
  BI_INLINE V combine(V a, V b) {
    return a + b;
  }
  BI_INLINE float finish(float total) { return total + 0.0f; }
};
struct Product {
  static constexpr float identity = 1.0f;
  template <class V>
  BI_INLINE V combine(V a, V b) {
    return a * b;
  }
  BI_INLINE float finish(float total) { return total; }
};

// Applies `body(i, count)` to 0 <= i < n in vectors of 16; the last count may be smaller.
template <class Body>
BI_INLINE void for_vectors(i64 n, Body body) {
  i64 i = 0;
  for (; i + 16 <= n; i += 16) body(i, i64{16});
  if (i < n) body(i, n - i);
}

// Terms are functors: `at(i, count)` gives terms i.. of a row as fp32, `count` of them (16, or
// fewer at the end of the row). It is called once for each 16 terms, in any order, and may have
// effects on its own elements.
template <class Op, class At>
BI_INLINE f32x16 last_terms(const At& at, i64 whole, i64 end) {
  return first_lanes(at(whole, end - whole), end - whole, Op::identity);
}

// Writes the lanes of elements begin..end, which lie in one segment, in whole vectors: as many as
// hold elements. Reads the row from front to back, which memory likes best.
template <class Op, class At>
__attribute__((noinline)) void segment_lanes(i64 begin, i64 end, float* lanes, At at) {
  i64 whole = begin + (end - begin) / 16 * 16;
  i64 first = min(whole, begin + LANES);
  for (i64 i = begin; i < first; i += 16) store(lanes + (i - begin), at(i, i64{16}));
  for (i64 i = first; i < whole; i += 16) {
    float* lane = lanes + (i - begin) % LANES;
    store(lane, Op::combine(load<f32x16>(lane), at(i, i64{16})));
  }
  if (whole < end) {
    f32x16 tail = last_terms<Op>(at, whole, end);
    float* lane = lanes + (whole - begin) % LANES;
    store(lane, whole - begin < LANES ? tail : Op::combine(load<f32x16>(lane), tail));
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
  f32x4 b = Op::combine(__builtin_shufflevector(a, a, 0, 1, 2, 3),
                        __builtin_shufflevector(a, a, 4, 5, 6, 7));
  float c = Op::combine(b[0], b[2]);
  return Op::finish(Op::combine(c, Op::combine(b[1], b[3])));
}

// Folds COUNT vectors (a power of two) by halves: FIRST and every STEP-th after it.
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
    case 1:
      return fold_vector<Op>(load<f32x16>(lanes));
    case 2:
      return fold_vector<Op>(fold_vectors<Op, 2>(lanes));
    case 4:
      return fold_vector<Op>(fold_vectors<Op, 4>(lanes));
    case 8:
      return fold_vector<Op>(fold_vectors<Op, 8>(lanes));
    case 16:
      return fold_vector<Op>(fold_vectors<Op, 16>(lanes));
    default:
      return fold_vector<Op>(fold_vectors<Op, 32>(lanes));
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

// The whole order over one row, on one thread.
template <class Op, class At>
__attribute__((noinline)) float reduce_row(i64 n, At at) {
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
  // One segment: each lane's total stays in registers, and is folded once before it is written.
  i64 whole = n / 16 * 16;
  f32x16 tail = whole < n ? last_terms<Op>(at, whole, n) : f32x16{};
  if (n <= 16) return fold_vector<Op>(whole < n ? tail : at(i64{0}, i64{16}));
  i64 i = 0;
  if (n <= LANES) {
    i64 half = i64{1} << (63 - __builtin_clzll(static_cast<u64>(n - 1)));
    for (; i + half < whole; i += 16)
      store(lanes + i, Op::combine(at(i, i64{16}), at(i + half, i64{16})));
    for (; i < half; i += 16) store(lanes + i, at(i, i64{16}));
    if (whole < n)
      store(lanes + whole - half, Op::combine(load<f32x16>(lanes + whole - half), tail));
    return fold_lanes<Op>(lanes, half);
  }
  i64 tail_lane = whole < n ? whole % LANES : -1;
  for (; i < LANES / 2; i += 16) {
    f32x16 first = at(i, i64{16});
    for (i64 k = i + LANES; k < whole; k += LANES) first = Op::combine(first, at(k, i64{16}));
    if (i == tail_lane) first = Op::combine(first, tail);
    i64 j = i + LANES / 2;
    f32x16 second = at(j, i64{16});
    for (i64 k = j + LANES; k < whole; k += LANES) second = Op::combine(second, at(k, i64{16}));
    if (j == tail_lane) second = Op::combine(second, tail);
    store(lanes + i, Op::combine(first, second));
  }
  return fold_lanes<Op>(lanes, LANES / 2);
}

// Up to this many elements, waking a second thread costs more than it saves.
constexpr i64 WORTH_A_THREAD = 32768;

// Runs `body(begin, end)` over ranges of rows, on several threads when there is enough to do.
template <class Body>
inline Status for_row_ranges(int threads, i64 rows, i64 n, Body body) {
  i64 elements = rows * max(n, 1);
  if (elements <= WORTH_A_THREAD) threads = 1;
  i64 tasks =
      threads <= 1 ? 1 : min(rows, max(threads, min(4 * threads, elements / WORTH_A_THREAD)));
  return parallel_for(threads, tasks, [&](i64 task) -> Status {
    return body(rows * task / tasks, rows * (task + 1) / tasks);
  });
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
    case F32:
      return body(float{});
    case BF16:
      return body(bf16{});
    case F16:
      return body(f16{});
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
