// Whether CUDA can be used here.
#include "common.cuh"

namespace toca::cuda {

int toolkit_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int device_count(const char** error) {
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);
  if (result == cudaSuccess || result == cudaErrorNoDevice) return count;
  *error = cudaGetErrorString(result);
  return -1;
}

}  // namespace toca::cuda
