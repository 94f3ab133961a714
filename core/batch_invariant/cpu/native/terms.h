// What row reductions add up: functors for lanes.h that give 16 terms at a time, each rounded to
// fp32.
#pragma once
#include "math.h"
#include "partial.h"

namespace bi {

BI_INLINE f32x16 magnitude(f32x16 x) { return bit_cast<f32x16>(bit_cast<u32x16>(x) & 0x7fffffffu); }

// Asks for the memory that comes 8 KiB later: the hardware does not look beyond the end of a page,
// and a row is walked in several places at once. Beyond the last row the request is ignored.
template <class T>
BI_INLINE f32x16 load_ahead(const T* p, i64 count) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 8192);
  return load_part(p, count);
}

template <class T>
struct Values {
  const T* x;
  __attribute__((always_inline)) f32x16 operator()(i64 i, i64 count) const {
    return load_ahead(x + i, count);
  }
};

template <class T>
struct Magnitudes {
  const T* x;
  __attribute__((always_inline)) f32x16 operator()(i64 i, i64 count) const {
    return magnitude(load_ahead(x + i, count));
  }
};

template <class T>
struct NonZeros {
  const T* x;
  __attribute__((always_inline)) f32x16 operator()(i64 i, i64 count) const {
    return load_ahead(x + i, count) != 0.0f ? splat(1.0f) : splat(0.0f);
  }
};

// Of x, or of x + residual where there is one.
template <class T, bool RESIDUAL = false>
struct Squares {
  const T* x;
  const T* residual = nullptr;
  __attribute__((always_inline)) f32x16 operator()(i64 i, i64 count) const {
    f32x16 v = load_ahead(x + i, count);
    if constexpr (RESIDUAL) v = v + load_ahead(residual + i, count);
    return v * v;
  }
};

template <class T>
struct SquaredDifferences {
  const T* x;
  float mean;
  __attribute__((always_inline)) f32x16 operator()(i64 i, i64 count) const {
    f32x16 d = load_ahead(x + i, count) - mean;
    return d * d;
  }
};

// exp(x - max), short_exp where SHORT; also written to `keep` where KEEP.
template <class T, bool SHORT, bool KEEP>
struct Exponentials {
  const T* x;
  float max;
  float* keep = nullptr;
  __attribute__((always_inline)) f32x16 operator()(i64 i, i64 count) const {
    f32x16 v = load_part(x + i, count) - max;
    f32x16 e;
    if constexpr (SHORT) {
      e = short_exp(v);
    } else {
      e = exp(v);
    }
    if constexpr (KEEP) store_part(keep + i, e, count);
    return e;
  }
};

template <class T>
struct Products {
  const T *x, *y;
  __attribute__((always_inline)) f32x16 operator()(i64 i, i64 count) const {
    return load_ahead(x + i, count) * load_ahead(y + i, count);
  }
};

}  // namespace bi
