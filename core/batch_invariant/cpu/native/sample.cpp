// Draws of Gumbel-max sampling, with noise keyed by (seed, position, column).
#include "lanes.h"
#include "math.h"
#include "rows.h"

namespace bi {
namespace {

typedef u64 u64x16 __attribute__((vector_size(128)));

constexpr i64 BLOCK = 64;  // columns whose noise is made at once: 4 words of 16 counters

// Philox4x32-10 of 16 counters with one key. Source: Salmon et al., Parallel random numbers: as easy
// as 1, 2, 3, SC 2011.
BI_INLINE void philox(u32x16 counter[4], u32 key0, u32 key1) {
  for (int round = 0; round < 10; ++round) {
    u64x16 left = __builtin_convertvector(counter[0], u64x16) * 0xD2511F53u;
    u64x16 right = __builtin_convertvector(counter[2], u64x16) * 0xCD9E8D57u;
    counter[0] = __builtin_convertvector(right >> 32, u32x16) ^ counter[1] ^ key0;
    counter[2] = __builtin_convertvector(left >> 32, u32x16) ^ counter[3] ^ key1;
    counter[1] = __builtin_convertvector(right, u32x16);
    counter[3] = __builtin_convertvector(left, u32x16);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// The words of columns first .. first + 63, which is word i % 4 of counter i / 4.
BI_INLINE void words_of(i64 seed, i64 position, i64 first, u32* words) {
  constexpr u32x16 index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  u64 at = static_cast<u64>(position), key = static_cast<u64>(seed);
  u32x16 zero = {};
  u32x16 counter[4] = {index + static_cast<u32>(first / 4), zero + static_cast<u32>(at),
                       zero + static_cast<u32>(at >> 32), zero};
  philox(counter, static_cast<u32>(key), static_cast<u32>(key >> 32));
  for (int i = 0; i < 16; ++i) {
    for (int word = 0; word < 4; ++word) words[4 * i + word] = counter[word][i];
  }
}

// -log(-log(1 - v)) with v = (w + 1/2) 2^-31, w being the upper 31 bits; v is at most 1 - 2^-24.
BI_INLINE f32x16 gumbel(u32x16 words) {
  f32x16 v = (__builtin_convertvector(bit_cast<i32x16>(words >> 1), f32x16) + 0.5f) * 0x1p-31f;
  v = v > 1.0f - 0x1p-24f ? splat(1.0f - 0x1p-24f) : v;
  return -log(minus_log1m(v));
}

// (x - top) / temperature; 0 for what equals the top, infinities too.
BI_INLINE f32x16 scaled(f32x16 x, float top, float temperature) {
  f32x16 difference = x == top ? f32x16{} : x - top;
  return difference / temperature;
}

// The largest number; NaN if there is one.
template <class T>
float top_of(const T* x, i64 n) {
  f32x16 best = splat(-INFINITY_F32);
  i32x16 nan = {};
  for_vectors(n, [&](i64 i, i64 count) __attribute__((always_inline)) {
    f32x16 v = first_lanes(load_part(x + i, count), count, -INFINITY_F32);
    best = v > best ? v : best;
    nan |= v != v;
  });
  float top = best[0];
  for (int lane = 0; lane < 16; ++lane) {
    if (nan[lane] != 0) return NAN_F32;
    if (best[lane] > top) top = best[lane];
  }
  return top;
}

struct Row {
  i64 seed, position;
  float temperature, min_p;
  const u8* keep;  // null: all
};

// The first of the largest scores; -1 if there is nothing to draw from.
template <class T>
i64 draw(const T* x, i64 n, const Row& row) {
  float top = top_of(x, n);
  if (!(top > -INFINITY_F32)) return -1;
  bool greedy = row.temperature == 0.0f;
  f32x16 best = splat(-INFINITY_F32);
  i32x16 where = {};
  constexpr i32x16 index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  alignas(64) u32 words[BLOCK];
  for (i64 i = 0; i < n; i += 16) {
    i64 count = min(16, n - i);
    f32x16 v = first_lanes(load_part(x + i, count), count, -INFINITY_F32);
    f32x16 score;
    if (greedy) {
      score = v;
    } else {
      if (i % BLOCK == 0) words_of(row.seed, row.position, i, words);
      f32x16 z = scaled(v, top, row.temperature);
      score = z + gumbel(load<u32x16>(words + i % BLOCK));
      if (row.min_p > 0.0f) score = exp(z) >= row.min_p ? score : splat(-INFINITY_F32);
      if (row.keep != nullptr) {
        u8 keep[16] = {};
        __builtin_memcpy(keep, row.keep + i, static_cast<size_t>(count));
        for (int lane = 0; lane < 16; ++lane) {
          if (keep[lane] == 0) score[lane] = -INFINITY_F32;
        }
      }
    }
    i32x16 better = score > best;
    best = better ? score : best;
    where = better ? index + static_cast<i32>(i) : where;
  }
  float most = best[0];
  i64 first = where[0];
  for (int lane = 1; lane < 16; ++lane) {
    if (best[lane] < most || (best[lane] == most && where[lane] > first)) continue;
    most = best[lane];
    first = where[lane];
  }
  return first;
}

}  // namespace
}  // namespace bi

using namespace bi;

BI_EXPORT i32 bi_row_sample(i32 dtype, i64 rows, i64 n, const void* x, const i64* seeds,
                            const i64* positions, const float* temperature, const float* min_p,
                            const u8* keep, i64* out, i32 threads) {
  if (rows < 0 || n < 1 || n >= i64{1} << 31) return BAD_ARGUMENT;
  return with_dtype(dtype, [&](auto in) -> Status {
    using T = decltype(in);
    const T* from = static_cast<const T*>(x);
    return for_rows(threads, rows, 16 * n, [=](i64 row) {
      out[row] = draw(from + row * n, n,
                      Row{seeds[row], positions[row], temperature[row],
                          min_p == nullptr ? 0.0f : min_p[row],
                          keep == nullptr ? nullptr : keep + row * n});
    });
  });
}

BI_EXPORT i32 bi_sample_weights(i32 dtype, i64 rows, i64 n, const void* x,
                                const float* temperature, i64* out, i32 threads) {
  if (rows < 0 || n < 1) return BAD_ARGUMENT;
  return with_dtype(dtype, [&](auto in) -> Status {
    using T = decltype(in);
    const T* from = static_cast<const T*>(x);
    return for_rows(threads, rows, n, [=](i64 row) {
      float top = to_f32(from[row * n]);
      for_vectors(n, [&](i64 i, i64 count) __attribute__((always_inline)) {
        f32x16 v = load_part(from + row * n + i, count);
        f32x16 weight = exp(scaled(v, top, temperature[row])) * 0x1p40f;
        for (i64 lane = 0; lane < count; ++lane) {
          // A NaN has no weight; its row draws nothing.
          out[row * n + i + lane] = weight[lane] >= 0.0f ? static_cast<i64>(weight[lane]) : 0;
        }
      });
    });
  });
}

// One block: counter [4], key [2], out [4]. For checks against published vectors.
BI_EXPORT i32 bi_philox(const u32* counter, const u32* key, u32* out) {
  u32x16 zero = {};
  u32x16 state[4] = {zero + counter[0], zero + counter[1], zero + counter[2], zero + counter[3]};
  philox(state, key[0], key[1]);
  for (int word = 0; word < 4; ++word) out[word] = state[word][0];
  return OK;
}
