// What this CPU can run. Compiled for the baseline CPU, since it decides whether the rest may be
// called.
#include "cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace bi {

#if defined(__x86_64__)
namespace {

u64 enabled_state() {
  u32 low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<u64>(high) << 32) | low;
}

bool has_all(u32 word, u32 bits) { return (word & bits) == bits; }

// Linux hands out the 8 KiB of tile state only to a process that asked for it.
bool amx_permitted() {
#if defined(__linux__)
  constexpr long ARCH_PRCTL = 158, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}

u32 detect() {
  u32 a, b, c, d;
  if (__get_cpuid_max(0, nullptr) < 7) return 0;
  __cpuid(1, a, b, c, d);
  constexpr u32 FMA = 1u << 12, MOVBE = 1u << 22, OSXSAVE = 1u << 27, AVX = 1u << 28,
                F16C = 1u << 29;
  if (!has_all(c, FMA | MOVBE | OSXSAVE | AVX | F16C)) return 0;
  u64 state = enabled_state();
  constexpr u64 YMM = 0x6, ZMM = 0xe6, TILES = 0x60000;
  if ((state & YMM) != YMM) return 0;

  __cpuid(0x80000001, a, b, c, d);
  constexpr u32 LZCNT = 1u << 5;
  if (!has_all(c, LZCNT)) return 0;
  u32 leaf7a, leaf7b, leaf7c, leaf7d;
  __cpuid_count(7, 0, leaf7a, leaf7b, leaf7c, leaf7d);
  constexpr u32 BMI1 = 1u << 3, AVX2 = 1u << 5, BMI2 = 1u << 8;
  if (!has_all(leaf7b, BMI1 | AVX2 | BMI2)) return 0;
  u32 features = CPU_X86_64_V3;

  constexpr u32 F = 1u << 16, DQ = 1u << 17, CD = 1u << 28, BW = 1u << 30, VL = 1u << 31;
  if (!has_all(leaf7b, F | DQ | CD | BW | VL) || (state & ZMM) != ZMM) return features;
  features |= CPU_X86_64_V4;
  if (leaf7a < 1) return features;
  __cpuid_count(7, 1, a, b, c, d);
  constexpr u32 AVX512_BF16 = 1u << 5;
  if (!has_all(a, AVX512_BF16)) return features;
  features |= CPU_AVX512_BF16;
  constexpr u32 AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  if (has_all(leaf7d, AMX_BF16 | AMX_TILE) && (state & TILES) == TILES && amx_permitted()) {
    features |= CPU_AMX_BF16;
  }
  return features;
}

}  // namespace
#elif defined(__aarch64__)
namespace {
u32 detect() { return CPU_NEON; }
}  // namespace
#else
#error "no kernels for this architecture"
#endif

u32 cpu_features() {
  // Two threads that race here compute the same value.
  static u32 known = 0;
  constexpr u32 DETECTED = 1u << 31;
  u32 value = __atomic_load_n(&known, __ATOMIC_RELAXED);
  if (value == 0) {
    value = detect() | DETECTED;
    __atomic_store_n(&known, value, __ATOMIC_RELAXED);
  }
  return value & ~DETECTED;
}

}  // namespace bi

BI_EXPORT bi::u32 bi_cpu_features() { return bi::cpu_features(); }
