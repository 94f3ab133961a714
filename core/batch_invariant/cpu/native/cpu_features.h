// The CPU features that choose a library and a bf16 order; native.py holds the same bits.
#pragma once
#include "types.h"

namespace bi {

enum CpuFeature : u32 {
  CPU_X86_64_V3 = 1,    // AVX2, FMA, F16C, BMI
  CPU_X86_64_V4 = 2,    // AVX-512 F, BW, CD, DQ, VL
  CPU_AVX512_BF16 = 4,  // VDPBF16PS
  CPU_AMX_BF16 = 8,     // TDPBF16PS, and the kernel lets this process use it
  CPU_NEON = 16,
};

u32 cpu_features();

}  // namespace bi
