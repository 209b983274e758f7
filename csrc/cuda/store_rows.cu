// store_rows: the rows of a full step into an 8-bit cache, or one that is extrapolated.
//
// Fused: the largest magnitude of a row, its scale, rounding, where a row is a warp's work; or its
// differences and the copy, where a thread owns 16 bytes.  Limited by memory: one read (the second
// of a row is from L1) and one write.
#include "eight_bit.cuh"
#include "forecast.cuh"

namespace toca::cuda {
namespace {

constexpr const char* kOp = "store_rows";
constexpr int kRows = 4;       // of a CTA
constexpr int kThreads = 256;  // of one, where a thread owns a pack

template <class T, class Q, int kVec>
__global__ void __launch_bounds__(kRows* kWarp, 1) store_rows_kernel(StoreRows p) {
  const int64_t r = int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp;
  if (r >= p.R) return;  // the whole warp
  store_row<kVec>(static_cast<const T*>(p.rows) + r * p.C, static_cast<Q*>(p.values) + r * p.C,
                  p.scale + r, int(p.C));
}

template <class T, class Q>
void run(const StoreRows& p, const Stream& stream) {
  constexpr int kVec = 16 / sizeof(T);
  const Shape shape{dim3(unsigned(div_up(p.R, int64_t(kRows)))), dim3(kRows * kWarp)};
  const bool vectors = p.C % kVec == 0 && fits(p.rows, 16) && fits(p.values, kVec);
  launch(kOp, stream, shape, vectors ? store_rows_kernel<T, Q, kVec> : store_rows_kernel<T, Q, 1>,
         p);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads, 1) store_forecast_kernel(StoreRows p) {
  const int packs = int(p.C / kVec);
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, r = i / packs;
  if (r >= p.R) return;
  const int64_t at = i * kVec;
  const auto fresh = load<kVec>(static_cast<const T*>(p.rows) + at);
  const auto before = load_around<kVec, T>(p.forecast, p.values, at, true);
  store_forecast(p.forecast, p.forecast.distance[r], before, fresh, p.values, at);
}

template <class T, int kVec>
void run_forecast(const StoreRows& p, const Stream& stream) {
  const int64_t ctas = div_up(p.R * (p.C / kVec), int64_t(kThreads));
  check_count(ctas, "blocks of 256 threads", kOp);
  launch(kOp, stream, {dim3(unsigned(ctas)), dim3(kThreads)}, store_forecast_kernel<T, kVec>, p);
}

template <class T>
void choose_forecast(const StoreRows& p, const Stream& stream) {
  constexpr int kVec = 16 / sizeof(T);
  if (p.C == 0) return;
  const bool vectors =
      p.C % kVec == 0 && fits(p.rows, 16) && fits(p.values, 16) && fits(p.forecast, 16);
  vectors ? run_forecast<T, kVec>(p, stream) : run_forecast<T, 1>(p, stream);
}

}  // namespace

void store_rows(const StoreRows& p, const Stream& stream) {
  check_count(p.C, "channels", kOp);
  check_count(p.R, "rows", kOp);
  if (p.R == 0) return;
  const OnDevice device(stream.device, kOp);
  with_type(p.dtype, [&](auto value) {
    using T = decltype(value);
    if (p.forecast.slopes) return choose_forecast<T>(p, stream);
    p.cache_dtype == DType::kInt8 ? run<T, Int8>(p, stream) : run<T, Float8>(p, stream);
  });
}

}  // namespace toca::cuda
