// The functions of math.h over flat arrays.
#include "math.h"
#include "partial.h"
#include "parallel.h"
#include "rows.h"

namespace bi {
namespace {

template <class F>
Status map(int threads, i64 n, const float* x, float* out, F f) {
  constexpr i64 PIECE = 16384;
  return parallel_for(n > PIECE ? threads : 1, ceil_div(n, PIECE), [=](i64 task) -> Status {
    i64 end = min(n, (task + 1) * PIECE);
    for (i64 i = task * PIECE; i < end; i += 16)
      store_part(out + i, f(load_part(x + i, end - i)), end - i);
    return OK;
  });
}

}  // namespace
}  // namespace bi

using namespace bi;

BI_EXPORT i32 bi_map(i32 op, i64 n, const float* x, float* out, i32 threads) {
  if (n < 0) return BAD_ARGUMENT;
  switch (op) {
    case MAP_EXP:
      return map(threads, n, x, out,
                 [](f32x16 v) __attribute__((always_inline)) { return exp(v); });
    case MAP_LOG:
      return map(threads, n, x, out,
                 [](f32x16 v) __attribute__((always_inline)) { return log(v); });
    case MAP_TANH:
      return map(threads, n, x, out,
                 [](f32x16 v) __attribute__((always_inline)) { return tanh(v); });
    case MAP_MINUS_LOG1M:
      return map(threads, n, x, out,
                 [](f32x16 v) __attribute__((always_inline)) { return minus_log1m(v); });
    case MAP_SHORT_EXP:
      return map(threads, n, x, out,
                 [](f32x16 v) __attribute__((always_inline)) { return short_exp(v); });
  }
  return BAD_ARGUMENT;
}
