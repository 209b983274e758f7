// Rows of a cache that is extrapolated to the step that reads it: csrc/cpu/forecast.h.
#pragma once

#include "common.cuh"

namespace toca::cuda {

// What belongs to a pack of a forecast cache; only what is needed was loaded.
template <class T, int kVec>
struct Around {
  Pack<T, kVec> first;  // slope[0]
  Pack<T, kVec> other;  // slope[1] of a row that is read, the value before of one that is written
};

template <int kVec, class T>
__device__ Around<T, kVec> load_around(const Forecast& f, const void* cache, int64_t at,
                                       bool fresh) {
  Around<T, kVec> found;
  if (fresh ? f.computed > 1 && f.slopes > 1 : f.order > 0)
    found.first = load_once<kVec>(static_cast<const T*>(f.slope[0]) + at);
  if (fresh ? f.computed > 0 : f.order > 1)
    found.other = load_once<kVec>(static_cast<const T*>(fresh ? cache : f.slope[1]) + at);
  return found;
}

// value + d * slope[0] + d^2 / 2 * slope[1], the first `order` slopes only.
template <class T, int kVec>
__device__ void extrapolate(const Forecast& f, float d, const Around<T, kVec>& around,
                            float* value) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (f.order > 0) value[i] += d * to_float(around.first.value[i]);
    if (f.order > 1) value[i] += 0.5f * d * d * to_float(around.other.value[i]);
  }
}

// Writes a fresh pack and its differences.
template <class T, int kVec>
__device__ void store_forecast(const Forecast& f, float d, const Around<T, kVec>& before,
                               const Pack<T, kVec>& fresh, void* cache, int64_t at) {
  Pack<T, kVec> first, second;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float slope =
        f.computed > 0 ? (to_float(fresh.value[i]) - to_float(before.other.value[i])) / d : 0.f;
    first.value[i] = from_float<T>(slope);
    if (f.slopes < 2) continue;
    second.value[i] =
        from_float<T>(f.computed > 1 ? (slope - to_float(before.first.value[i])) / d : 0.f);
  }
  store_once(static_cast<T*>(f.slope[0]) + at, first);
  if (f.slopes > 1) store_once(static_cast<T*>(f.slope[1]) + at, second);
  store_once(static_cast<T*>(cache) + at, fresh);
}

inline bool fits(const Forecast& f, size_t bytes_of_pack) {
  return fits(f.slope[0], bytes_of_pack) && fits(f.slope[1], bytes_of_pack);
}

}  // namespace toca::cuda
