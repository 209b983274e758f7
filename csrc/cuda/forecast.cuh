// Rows of a cache that is extrapolated to the step that reads it: csrc/cpu/forecast.h.
#pragma once

#include "common.cuh"

namespace toca::cuda {

// kVec values at `at` + d * slope[0] + d^2 / 2 * slope[1], the first `order` slopes only.
template <int kVec, class T>
__device__ void extrapolate(const Forecast& f, float d, int64_t at, float* value) {
  if (f.order == 0) return;
  const auto first = load_once<kVec>(static_cast<const T*>(f.slope[0]) + at);
  if (f.order == 1) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) value[i] += d * to_float(first.value[i]);
    return;
  }
  const auto second = load_once<kVec>(static_cast<const T*>(f.slope[1]) + at);
  const float half = 0.5f * d * d;
#pragma unroll
  for (int i = 0; i < kVec; ++i)
    value[i] += d * to_float(first.value[i]) + half * to_float(second.value[i]);
}

}  // namespace toca::cuda
