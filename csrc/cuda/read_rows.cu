// read_rows: what a cache stands for, in the features' dtype.
//
// Fused: gather, scale or extrapolation, rounding.  A thread owns 16 bytes of a row.  Limited by
// memory: one read of the rows (and of their slopes), one write.
#include "eight_bit.cuh"
#include "forecast.cuh"

namespace toca::cuda {
namespace {

constexpr const char* kOp = "read_rows";
constexpr int kThreads = 256;

template <class T, int kVec>
__device__ Pack<T, kVec> read_pack(const ReadRows& p, int64_t row, int c) {
  const int64_t at = row * p.C + c;
  float value[kVec];
  if (p.cache_scale) {
    load_scaled<kVec>(p.cache, p.cache_scale, p.cache_dtype, row, at, value);
  } else {
    const auto pack = load_once<kVec>(static_cast<const T*>(p.cache) + at);
    if (!p.forecast.order) return pack;
#pragma unroll
    for (int i = 0; i < kVec; ++i) value[i] = to_float(pack.value[i]);
    const auto slopes = load_around<kVec, T>(p.forecast, p.cache, at, false);
    extrapolate(p.forecast, p.forecast.distance[row], slopes, value);
  }
  Pack<T, kVec> out;
#pragma unroll
  for (int i = 0; i < kVec; ++i) out.value[i] = from_float<T>(value[i]);
  return out;
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads, 1) read_rows_kernel(ReadRows p) {
  const int packs = int(p.C / kVec), k = int(p.k);
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t r = i / packs;
  if (r >= p.B * k) return;
  const int64_t b = r / k, n = p.index ? p.index[r] : r - b * k;
  const int c = int(i - r * packs) * kVec;
  Pack<T, kVec> out;
  if (n >= 0 && n < p.N) {
    out = read_pack<T, kVec>(p, b * p.N + n, c);
  } else {  // a wrong index shows, and nothing was read there
#pragma unroll
    for (int j = 0; j < kVec; ++j) out.value[j] = from_float<T>(nanf(""));
  }
  store(static_cast<T*>(p.out) + r * p.C + c, out);
}

template <class T>
bool in_vectors(const ReadRows& p) {
  constexpr int kVec = 16 / sizeof(T);
  return p.C % kVec == 0 && fits(p.out, 16) && fits(p.cache, p.cache_scale ? kVec : 16) &&
         fits(p.forecast, 16);
}

template <class T, int kVec>
void run(const ReadRows& p, const Stream& stream) {
  const int64_t packs = p.B * p.k * (p.C / kVec), ctas = div_up(packs, int64_t(kThreads));
  check_count(ctas, "blocks of 256 threads", kOp);
  launch(kOp, stream, {dim3(unsigned(ctas)), dim3(kThreads)}, read_rows_kernel<T, kVec>, p);
}

}  // namespace

void read_rows(const ReadRows& p, const Stream& stream) {
  check_count(p.C, "channels", kOp);
  check_count(p.B * p.k, "rows", kOp);
  if (p.B * p.k * p.C == 0) return;
  const OnDevice device(stream.device, kOp);
  with_type(p.dtype, [&](auto value) {
    using T = decltype(value);
    in_vectors<T>(p) ? run<T, 16 / sizeof(T)>(p, stream) : run<T, 1>(p, stream);
  });
}

}  // namespace toca::cuda
