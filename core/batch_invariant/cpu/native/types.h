// The integer names, dtype codes and export macro shared by every kernel of the library.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define BI_EXPORT extern "C" __attribute__((visibility("default")))
#define BI_INLINE static inline __attribute__((always_inline))

namespace bi {

using i64 = int64_t;
using u64 = uint64_t;
using i32 = int32_t;
using u32 = uint32_t;
using u16 = uint16_t;
using u8 = uint8_t;

// Storage of the two 16-bit formats: distinct types, so that templates tell them apart.
struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

// The codes that Python passes; native.py holds the same table.
enum DType : i32 { F32 = 0, F64 = 1, BF16 = 2, F16 = 3 };

// What an entry point returns; native.py turns each into an exception.
enum Status : i32 { OK = 0, BAD_DTYPE = 1, BAD_ARGUMENT = 2, OUT_OF_MEMORY = 3 };

constexpr i64 min(i64 a, i64 b) { return a < b ? a : b; }
constexpr i64 max(i64 a, i64 b) { return a > b ? a : b; }
constexpr i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
constexpr i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }

}  // namespace bi
