// See cuda_runtime.h.  The conversions are those of the CPU bodies.
#pragma once

#include "cpu/vec.h"
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) { return toca::cpu::TOCA_ISA::half_to_float(value.bits); }
inline __half __float2half_rn(float value) { return {toca::cpu::TOCA_ISA::float_to_half(value)}; }
