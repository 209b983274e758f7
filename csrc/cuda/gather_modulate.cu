// gather_modulate: residual + LayerNorm/RMSNorm + modulation of the selected rows.
//
// Fused: gather, x + gate * cache (which may be held in 8 bits, or extrapolated), mean and
// variance, affine, modulation.  A row is the work of some warps and stays in their registers
// between its passes; narrow rows share a CTA.  Limited by latency for few rows (a load, two sums
// over the row, a store), else by memory: one read of the rows of x and of the cache, one write.
//
// x and the cache are read again by the block's scatter_residual, so no load is a streaming one.
#include "eight_bit.cuh"
#include "forecast.cuh"

namespace toca::cuda {
namespace {

constexpr const char* kOp = "gather_modulate";
constexpr int kValues = 16;        // of a row that a thread holds
constexpr int kMostThreads = 768;  // of a row; more would leave a thread too few registers
constexpr int kMaxChannels = kValues * kMostThreads;
constexpr int kThreads = 128;  // of a CTA whose rows need fewer

enum class Cached { kPlain, kEightBit, kForecast };

// A row of this CTA: blockDim.x threads, at threadIdx.y.
struct Row {
  int64_t b, n, out;
  bool present, inside;  // there is such a row; and its index is in range
};

__device__ Row row_of_thread(const GatherModulate& p) {
  const int k = int(p.k), rows = int(p.B) * k;
  const int r = blockIdx.x * blockDim.y + threadIdx.y;
  if (r >= rows) return {0, 0, 0, false, false};
  const int b = r / k;
  const int64_t n = p.index ? p.index[r] : r - b * k;
  return {b, n, r, true, n >= 0 && n < p.N};
}

// The sum over the threads of a row; `of_warp` is used once in a launch.
__device__ float row_sum(float value, float* of_warp) {
  value = warp_sum(value);
  const int warps = blockDim.x / kWarp;
  if (warps == 1) return value;
  of_warp += threadIdx.y * warps;
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = of_warp[0];
  for (int w = 1; w < warps; ++w) sum += of_warp[w];
  return sum;
}

// The channel of a thread's i-th pack.
template <int kVec>
__device__ int channel(int i) {
  return (int(threadIdx.x) + i * int(blockDim.x)) * kVec;
}

// The thread's part of x + gate * cache.
template <class T, int kVec, Cached kCached>
__device__ void load_row(const GatherModulate& p, const Row& row, float (*value)[kVec]) {
  constexpr int kPacks = kValues / kVec;
  const int C = int(p.C);
  const int64_t token = row.b * p.N + row.n, first = token * C;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = channel<kVec>(i);
    if (c >= C) continue;
    const auto x = load<kVec>(static_cast<const T*>(p.x) + first + c);
#pragma unroll
    for (int j = 0; j < kVec; ++j) value[i][j] = to_float(x.value[j]);
  }
  if (!p.cache) return;
  const T* gates = p.gate.data ? row_of<T>(p.gate, row.b, row.n) : nullptr;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = channel<kVec>(i);
    if (c >= C) continue;
    float cached[kVec];
    if (kCached == Cached::kEightBit) {
      load_scaled<kVec>(p.cache, p.cache_scale, p.cache_dtype, token, first + c, cached);
    } else {
      const auto pack = load<kVec>(static_cast<const T*>(p.cache) + first + c);
#pragma unroll
      for (int j = 0; j < kVec; ++j) cached[j] = to_float(pack.value[j]);
    }
    if (kCached == Cached::kForecast) {
      const auto slopes = load_around<kVec, T>(p.forecast, p.cache, first + c, false);
      extrapolate(p.forecast, p.forecast.distance[token], slopes, cached);
    }
    if (gates) {
      const auto gate = load<kVec>(gates + c);
#pragma unroll
      for (int j = 0; j < kVec; ++j) cached[j] *= to_float(gate.value[j]);
    }
#pragma unroll
    for (int j = 0; j < kVec; ++j) value[i][j] += cached[j];
  }
}

// The affine parameters of the norm and the modulation, for one pack.
template <class T, int kVec>
__device__ Pack<T, kVec> modulated(const GatherModulate& p, const Row& row, int c, float* value) {
  if (p.weight) {
    const auto weight = load<kVec>(static_cast<const T*>(p.weight) + c);
#pragma unroll
    for (int j = 0; j < kVec; ++j) value[j] *= to_float(weight.value[j]);
  }
  if (p.bias) {
    const auto bias = load<kVec>(static_cast<const T*>(p.bias) + c);
#pragma unroll
    for (int j = 0; j < kVec; ++j) value[j] += to_float(bias.value[j]);
  }
  const auto scale = load<kVec>(row_of<T>(p.scale, row.b, row.n) + c);
  const auto shift = load<kVec>(row_of<T>(p.shift, row.b, row.n) + c);
  Pack<T, kVec> out;
#pragma unroll
  for (int j = 0; j < kVec; ++j)
    out.value[j] =
        from_float<T>(value[j] * (1.f + to_float(scale.value[j])) + to_float(shift.value[j]));
  return out;
}

template <class T, int kVec, Cached kCached>
__global__ void __launch_bounds__(kMostThreads, 1) gather_modulate_kernel(GatherModulate p) {
  constexpr int kPacks = kValues / kVec;
  __shared__ float of_warp[2][kWarp];
  const Row row = row_of_thread(p);
  const int C = int(p.C);
  float value[kPacks][kVec] = {};
  if (row.inside) load_row<T, kVec, kCached>(p, row, value);

  // Every thread of the CTA takes part in the sums, whether it has a row or not.
  float mean = 0.f, squares = 0.f;
  if (!p.rms) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
#pragma unroll
      for (int j = 0; j < kVec; ++j) mean += value[i][j];
    mean = row_sum(mean, of_warp[0]) / float(C);
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (channel<kVec>(i) >= C) continue;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      value[i][j] -= mean;
      squares += value[i][j] * value[i][j];
    }
  }
  const float rstd = 1.f / sqrtf(row_sum(squares, of_warp[1]) / float(C) + p.eps);

  if (!row.present) return;
  T* out = static_cast<T*>(p.out) + row.out * C;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = channel<kVec>(i);
    if (c >= C) continue;
    Pack<T, kVec> result;
    if (row.inside) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) value[i][j] *= rstd;
      result = modulated<T, kVec>(p, row, c, value[i]);
    } else {  // a wrong index shows, and nothing was read there
#pragma unroll
      for (int j = 0; j < kVec; ++j) result.value[j] = from_float<T>(nanf(""));
    }
    store(out + c, result);
  }
}

template <class T>
bool in_vectors(const GatherModulate& p) {
  constexpr int kVec = 16 / sizeof(T);
  return p.C % kVec == 0 && fits(p.x, 16) && fits(p.out, 16) && fits(p.weight, 16) &&
         fits(p.bias, 16) && fits(p.cache, p.cache_scale ? kVec : 16) && fits(p.shift, 16, kVec) &&
         fits(p.scale, 16, kVec) && fits(p.gate, 16, kVec) && fits(p.forecast, 16);
}

template <class T, int kVec>
void run(const GatherModulate& p, const Stream& stream) {
  const int packs = div_up(int(p.C), kVec);
  const int threads = div_up(div_up(packs, kValues / kVec), kWarp) * kWarp;
  const int rows = kThreads > threads ? kThreads / threads : 1;
  const Shape shape{dim3(unsigned(div_up(p.B * p.k, int64_t(rows)))),
                    dim3(unsigned(threads), unsigned(rows))};
  launch(kOp, stream, shape,
         p.cache_scale       ? gather_modulate_kernel<T, kVec, Cached::kEightBit>
         : p.forecast.slopes ? gather_modulate_kernel<T, kVec, Cached::kForecast>
                             : gather_modulate_kernel<T, kVec, Cached::kPlain>,
         p);
}

}  // namespace

void gather_modulate(const GatherModulate& p, const Stream& stream) {
  if (p.C > kMaxChannels)
    throw std::invalid_argument("x: expected at most " + std::to_string(kMaxChannels) +
                                " channels on CUDA, got " + std::to_string(p.C));
  check_count(p.B * p.k, "rows", kOp);
  if (p.B * p.k * p.C == 0) return;
  const OnDevice device(stream.device, kOp);
  with_type(p.dtype, [&](auto value) {
    using T = decltype(value);
    in_vectors<T>(p) ? run<T, 16 / sizeof(T)>(p, stream) : run<T, 1>(p, stream);
  });
}

}  // namespace toca::cuda
