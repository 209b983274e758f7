// What the CUDA bodies share: launches and their errors, vectors of up to 16 bytes, sums of a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../toca.h"

namespace toca::cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;  // of a CTA
constexpr unsigned kAllLanes = 0xffffffffu;

template <class Integer>
__host__ __device__ constexpr Integer div_up(Integer a, Integer b) {
  return (a + b - 1) / b;
}

// --- launches ------------------------------------------------------------------------------------

inline void check(cudaError_t error, const char* op) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorString(error));
}

// Makes a device current, and afterwards the one that was.
class OnDevice {
 public:
  OnDevice(int device, const char* op) {
    check(cudaGetDevice(&before_), op);
    changed_ = device != before_;
    if (changed_) check(cudaSetDevice(device), op);
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

struct Shape {
  dim3 grid, block;
  size_t shared = 0;  // bytes of dynamic shared memory
};

template <class... Parameters, class... Arguments>
void launch(const char* op, const Stream& stream, const Shape& shape, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shape.shared > kWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shape.shared)),
          op);
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), op);
}

// Rows, tokens and channels are counted in int, with room for a grid's last CTA; elements are not.
inline void check_count(int64_t count, const char* what, const char* op) {
  constexpr int64_t kMost = 1 << 30;
  if (count > kMost)
    throw std::invalid_argument(std::string(op) + ": expected at most 2**30 " + what +
                                " on CUDA, got " + std::to_string(count));
}

// --- values --------------------------------------------------------------------------------------

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

template <class T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

// Calls body with a value of the C++ type.
template <class Body>
void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kBFloat16: return body(__nv_bfloat16{});
    case DType::kFloat16: return body(__half{});
    default: return body(float{});
  }
}

// --- vectors: one load or store of kVec values ---------------------------------------------------

template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<1> {
  using type = unsigned char;
};

template <class T, int kVec>
struct Pack {
  using Word = typename WordOf<int(sizeof(T)) * kVec>::type;
  T value[kVec];
};

template <int kVec, class T>
__device__ Pack<T, kVec> unpack(typename Pack<T, kVec>::Word word) {
  Pack<T, kVec> pack;
  std::memcpy(&pack, &word, sizeof(pack));
  return pack;
}

template <int kVec, class T>
__device__ Pack<T, kVec> load(const T* p) {
  return unpack<kVec, T>(*reinterpret_cast<const typename Pack<T, kVec>::Word*>(p));
}

// For bytes that nobody reads again soon: they leave the cache first.
template <int kVec, class T>
__device__ Pack<T, kVec> load_once(const T* p) {
  return unpack<kVec, T>(__ldcs(reinterpret_cast<const typename Pack<T, kVec>::Word*>(p)));
}

template <int kVec, class T>
__device__ void store(T* p, const Pack<T, kVec>& pack) {
  typename Pack<T, kVec>::Word word;
  std::memcpy(&word, &pack, sizeof(word));
  *reinterpret_cast<typename Pack<T, kVec>::Word*>(p) = word;
}

template <int kVec, class T>
__device__ void store_once(T* p, const Pack<T, kVec>& pack) {
  typename Pack<T, kVec>::Word word;
  std::memcpy(&word, &pack, sizeof(word));
  __stcs(reinterpret_cast<typename Pack<T, kVec>::Word*>(p), word);
}

// Whether rows that start at `data` and `strides` apart can be read kVec values at a time.
inline bool fits(const void* data, size_t bytes_of_pack) {
  return reinterpret_cast<uintptr_t>(data) % bytes_of_pack == 0;
}
inline bool fits(const RowsView& view, size_t bytes_of_pack, int vec) {
  return fits(view.data, bytes_of_pack) && view.stride_b % vec == 0 && view.stride_n % vec == 0;
}

template <class T>
__device__ const T* row_of(const RowsView& view, int64_t b, int64_t n) {
  return static_cast<const T*>(view.data) + b * view.stride_b + n * view.stride_n;
}

// --- warps ---------------------------------------------------------------------------------------

// Every lane gets the sum.
template <class Number>
__device__ Number warp_sum(Number value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int step = kWarp / 2; step > 0; step /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

}  // namespace toca::cuda
