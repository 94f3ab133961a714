// argmax, argmin and topk over rows. Which element wins is decided by one integer key per element,
// so ties have one answer: the lowest index.
#include "lanes.h"
#include "rows.h"

namespace bi {
namespace {

// An integer whose order is torch's order of numbers: -0 equals +0, every NaN equals NaN and is the
// largest.
BI_INLINE u32 rank_of(float x) {
  if (x != x) return 0xffffffffu;
  u32 bits = bit_cast<u32>(x + 0.0f);  // -0 becomes +0
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// Larger is earlier in the result; no two elements of a row have the same key.
BI_INLINE u64 key_of(float x, i64 index, bool largest) {
  u32 rank = rank_of(x);
  return (static_cast<u64>(largest ? rank : ~rank) << 32) | (0xffffffffu - static_cast<u32>(index));
}
BI_INLINE i64 index_of(u64 key) { return 0xffffffff - static_cast<i64>(key & 0xffffffffu); }

// Lets `heap[at]` sink among `size` keys; the least key is on top.
void sink(u64* heap, i64 size, i64 at) {
  u64 key = heap[at];
  for (;;) {
    i64 child = 2 * at + 1;
    if (child >= size) break;
    if (child + 1 < size && heap[child + 1] < heap[child]) ++child;
    if (key <= heap[child]) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = key;
}

// Some lane of x may come before `worst`: a cheap test that is never wrong when it says no.
template <bool LARGEST_FIRST>
BI_INLINE bool may_enter(f32x16 x, float worst) {
  i32x16 no = LARGEST_FIRST ? x <= worst : x >= worst;
  i32x16 all = ~no;
  u64x8 any = bit_cast<u64x8>(all);
  return (any[0] | any[1] | any[2] | any[3] | any[4] | any[5] | any[6] | any[7]) != 0;
}

// The k first keys of the row, in order, into `keys`: a heap of the best so far, then sorted in
// place.
template <bool LARGEST_FIRST, class T>
void topk_row(const T* x, i64 n, i64 k, u64* keys) {
  if (k == 0) return;
  for (i64 i = 0; i < k; ++i) keys[i] = key_of(to_f32(x[i]), i, LARGEST_FIRST);
  for (i64 at = k / 2 - 1; at >= 0; --at) sink(keys, k, at);
  float worst = to_f32(x[index_of(keys[0])]);
  auto offer = [&](i64 i) __attribute__((always_inline)) {
    u64 key = key_of(to_f32(x[i]), i, LARGEST_FIRST);
    if (key <= keys[0]) return;
    keys[0] = key;
    sink(keys, k, 0);
    worst = to_f32(x[index_of(keys[0])]);
  };
  i64 i = k;
  for (; i + 16 <= n; i += 16) {
    if (!may_enter<LARGEST_FIRST>(load_f32(x + i), worst)) continue;
    for (i64 j = i; j < i + 16; ++j) offer(j);
  }
  for (; i < n; ++i) offer(i);
  for (i64 size = k - 1; size > 0; --size) {
    u64 least = keys[0];
    keys[0] = keys[size];
    keys[size] = least;
    sink(keys, size, 0);
  }
}

template <class T>
Status topk(bool largest, i64 rows, i64 n, i64 k, const T* x, i64 stride, T* values, i64* indices,
            int threads) {
  return for_rows(threads, rows, n, [=](i64 row) {
    const T* from = x + row * stride;
    i64* to = indices + row * k;
    u64* keys =
        reinterpret_cast<u64*>(to);  // the room for indices holds the keys until they are sorted
    if (largest) {
      topk_row<true>(from, n, k, keys);
    } else {
      topk_row<false>(from, n, k, keys);
    }
    for (i64 i = 0; i < k; ++i) {
      to[i] = index_of(keys[i]);
      if (values != nullptr) values[row * k + i] = from[to[i]];
    }
  });
}

// The first extreme number, or the first NaN if there is one.
template <bool LARGEST_FIRST, class T>
i64 arg_extreme(const T* x, i64 n) {
  constexpr float NONE = LARGEST_FIRST ? -__builtin_inff() : __builtin_inff();
  f32x16 best = splat(NONE);
  i32x16 nan = {};
  for_vectors(n, [&](i64 i, i64 count) __attribute__((always_inline)) {
    f32x16 v = first_lanes(load_part(x + i, count), count, NONE);
    best = (LARGEST_FIRST ? v > best : v < best) ? v : best;
    nan |= v != v;
  });
  float extreme = best[0];
  bool any_nan = false;
  for (int lane = 0; lane < 16; ++lane) {
    any_nan = any_nan || nan[lane] != 0;
    if (LARGEST_FIRST ? best[lane] > extreme : best[lane] < extreme) extreme = best[lane];
  }
  for (i64 i = 0; i < n; ++i) {
    float v = to_f32(x[i]);
    if (any_nan ? v != v : v == extreme) return i;
  }
  return 0;
}

}  // namespace
}  // namespace bi

using namespace bi;

BI_EXPORT i32 bi_row_topk(i32 op, i32 dtype, i64 rows, i64 n, i64 k, const void* x, i64 x_stride,
                          void* values, i64* indices, i32 threads) {
  constexpr i64 INDEX_LIMIT = i64{1} << 32;
  if (rows < 0 || n < 0 || n >= INDEX_LIMIT || k < 0 || k > n || (op != LARGEST && op != SMALLEST))
    return BAD_ARGUMENT;
  return with_dtype(dtype, [&](auto in) -> Status {
    using T = decltype(in);
    return topk(op == LARGEST, rows, n, k, static_cast<const T*>(x), x_stride,
                static_cast<T*>(values), indices, threads);
  });
}

BI_EXPORT i32 bi_row_argmax(i32 op, i32 dtype, i64 rows, i64 n, const void* x, i64 x_stride,
                            i64* indices, i32 threads) {
  if (rows < 0 || n < 1 || (op != LARGEST && op != SMALLEST)) return BAD_ARGUMENT;
  return with_dtype(dtype, [&](auto in) -> Status {
    using T = decltype(in);
    const T* from = static_cast<const T*>(x);
    return for_rows(threads, rows, n, [=](i64 row) {
      const T* start = from + row * x_stride;
      indices[row] = op == LARGEST ? arg_extreme<true>(start, n) : arg_extreme<false>(start, n);
    });
  });
}
