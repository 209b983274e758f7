// Rows of a cache in 8 bits, with one float32 scale for each: csrc/cpu/eight_bit.h, bit for bit.
#pragma once

#include "common.cuh"

namespace toca::cuda {

struct Int8 {
  int8_t bits;
};
struct Float8 {  // e4m3fn: no infinity, NaN is 0x7f, the largest value 448
  uint8_t bits;
};

template <class Q>
constexpr float kUnit = 1.f;  // scale of a row whose largest magnitude is 1
template <>
constexpr float kUnit<Int8> = 1.f / 127.f;
template <>
constexpr float kUnit<Float8> = 1.f / 448.f;

__device__ inline float to_float(Int8 value) { return float(value.bits); }

__device__ inline float to_float(Float8 value) {
  const uint32_t rest = value.bits & 0x7f, normal = (rest << 20) + (120u << 23);
  const uint32_t small = __float_as_uint(2.f * __uint_as_float(normal) - 0x1p-6f);
  const uint32_t magnitude = rest == 0x7f ? 0x7fc00000u : rest < 8 ? small : normal;
  return __uint_as_float(magnitude | uint32_t(value.bits & 0x80) << 24);
}

template <>
__device__ inline Int8 from_float<Int8>(float value) {  // |value| < 127.5
  return {int8_t(__float2int_rn(value))};
}

template <>
__device__ inline Float8 from_float<Float8>(float value) {  // |value| < 464
  const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0x7ffff + (magnitude >> 20 & 1) - (120u << 23)) >> 20;
  const uint32_t small = uint32_t(__float2int_rn(__uint_as_float(magnitude) * 512.f));
  return {uint8_t((magnitude < (121u << 23) ? small : normal) | (bits >> 24 & 0x80))};
}

// A warp writes a row in 8 bits and its scale: 0 where it would be subnormal, NaN where the row is
// not finite; the values are 0 then.
template <int kVec, class T, class Q>
__device__ void store_row(const T* row, Q* values, float* scale, int C) {
  const int lane = threadIdx.x % kWarp;
  uint32_t largest = 0;  // bits of a magnitude: a NaN ranks above infinity
  for (int c = lane * kVec; c < C; c += kWarp * kVec) {
    const Pack<T, kVec> pack = load<kVec>(row + c);
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      largest = max(largest, __float_as_uint(to_float(pack.value[i])) & 0x7fffffffu);
  }
  for (int step = kWarp / 2; step > 0; step /= 2)
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));

  const bool finite = largest < 0x7f800000u;
  const float exact = finite ? __uint_as_float(largest) * kUnit<Q> : 0.f;
  const bool usable = exact >= 0x1p-126f;
  const float inverse = usable ? 1.f / exact : 0.f;
  if (lane == 0) *scale = usable ? exact : finite ? 0.f : __uint_as_float(0x7fc00000u);
  for (int c = lane * kVec; c < C; c += kWarp * kVec) {
    const Pack<T, kVec> pack = load<kVec>(row + c);
    Pack<Q, kVec> rounded;
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      rounded.value[i] = from_float<Q>(usable ? to_float(pack.value[i]) * inverse : 0.f);
    store_once(values + c, rounded);
  }
}

// kVec values of row `row` of a cache that has scales.
template <int kVec>
__device__ void load_scaled(const void* cache, const float* scale, DType dtype, int64_t row,
                            int64_t at, float* value) {
  const float unit = scale[row];
  if (dtype == DType::kInt8) {
    const auto pack = load<kVec>(static_cast<const Int8*>(cache) + at);
#pragma unroll
    for (int i = 0; i < kVec; ++i) value[i] = to_float(pack.value[i]) * unit;
  } else {
    const auto pack = load<kVec>(static_cast<const Float8*>(cache) + at);
#pragma unroll
    for (int i = 0; i < kVec; ++i) value[i] = to_float(pack.value[i]) * unit;
  }
}

}  // namespace toca::cuda
