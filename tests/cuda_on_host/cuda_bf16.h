// See cuda_runtime.h.  The conversions are those of the CPU bodies.
#pragma once

#include "cpu/vec.h"
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  return toca::cpu::TOCA_ISA::to_float(toca::cpu::TOCA_ISA::bf16{value.bits});
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  toca::cpu::TOCA_ISA::bf16 rounded[toca::cpu::TOCA_ISA::kVec];
  toca::cpu::TOCA_ISA::store(rounded, toca::cpu::TOCA_ISA::splat(value));
  return {rounded[0].bits};
}
