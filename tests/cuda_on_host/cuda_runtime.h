// As much of CUDA as csrc/cuda uses, run on the host: a CTA's threads are fibers of one thread.
//
// A fiber runs until it has to wait for others, at a barrier or a warp's collective; then another
// is picked at random, and CTAs run in a random order too.  A missing barrier therefore shows as a
// wrong result, and a barrier or a collective that not all reach as a failed launch.  What it
// cannot show: races between single instructions, and anything about speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ thread_local  // all fibers are in one thread

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace on_host {

enum class Collective { kShuffle, kBallot };

constexpr size_t kShared = 100 * 1024;  // bytes that a CTA can have
struct Shared {
  alignas(16) unsigned char* bytes;
  size_t size;
};

extern dim3 thread, block, block_size, grid_size;

void barrier(int line);
// Waits for the 32 threads of the warp; every lane's value is in values[] until the next
// collective.
const uint64_t* exchange(Collective kind, unsigned mask, uint64_t value);
int add(int* address, int value);
// Runs a kernel on every CTA; false: threads waited for each other in vain.
bool run(const dim3& grid, const dim3& block, const Shared& shared,
         const std::function<void()>& kernel);

template <class T>
uint64_t bits(T value) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(value));
  return word;
}
template <class T>
T value_of(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

inline unsigned lane() {
  return (thread.z * block_size.y * block_size.x + thread.y * block_size.x + thread.x) % 32;
}

}  // namespace on_host

inline const dim3& threadIdx = on_host::thread;
inline const dim3& blockIdx = on_host::block;
inline const dim3& blockDim = on_host::block_size;
inline const dim3& gridDim = on_host::grid_size;

using std::max;
using std::min;

inline void __syncthreads(int line = __builtin_LINE()) { on_host::barrier(line); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  const uint64_t* values =
      on_host::exchange(on_host::Collective::kShuffle, mask, on_host::bits(value));
  return on_host::value_of<T>(values[source & 31]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  return __shfl_sync(mask, value, int(on_host::lane()) ^ step);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int step) {
  const int source = int(on_host::lane()) + step;
  return __shfl_sync(mask, value, source < 32 ? source : int(on_host::lane()));
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const uint64_t* values = on_host::exchange(on_host::Collective::kBallot, mask, predicate);
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i) ballot |= unsigned(values[i]) << i;
  return ballot;
}
inline int atomicAdd(int* address, int value) { return on_host::add(address, value); }

inline int __ffs(unsigned value) { return __builtin_ffs(int(value)); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline uint32_t __float_as_uint(float value) {
  return on_host::value_of<uint32_t>(on_host::bits(value));
}
inline float __uint_as_float(uint32_t value) {
  return on_host::value_of<float>(on_host::bits(value));
}
inline int __float2int_rn(float value) { return int(std::lrint(value)); }

template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

// --- the runtime's API ---------------------------------------------------------------------------

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "threads wait for each other in vain" : "invalid value";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, int bytes) {
  return size_t(bytes) <= on_host::kShared ? cudaSuccess : cudaErrorInvalidValue;
}

// The dynamic shared memory of the kernels of this file, under the name that they give it.
namespace toca::cuda {
namespace {
thread_local uint4 memory[on_host::kShared / sizeof(uint4)];
}
}  // namespace toca::cuda

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  const unsigned threads = block.x * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || !threads || threads > 1024 || grid.y > 65535 ||
      config->dynamicSmemBytes > on_host::kShared)
    return cudaErrorInvalidValue;
  const on_host::Shared shared{reinterpret_cast<unsigned char*>(toca::cuda::memory),
                               sizeof(toca::cuda::memory)};
  const bool done = on_host::run(grid, block, shared, [&] { kernel(arguments...); });
  return done ? cudaSuccess : cudaErrorLaunchFailure;
}
