// store_rows: the rows of a full step into an 8-bit cache.
//
// Fused: the largest magnitude of a row, its scale, rounding.  A row is a warp's work.  Limited by
// memory: one read (the second of a row is from L1) and one write.
#include "eight_bit.cuh"

namespace toca::cuda {
namespace {

constexpr const char* kOp = "store_rows";
constexpr int kRows = 4;  // of a CTA

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

}  // namespace

void store_rows(const StoreRows& p, const Stream& stream) {
  check_count(p.C, "channels", kOp);
  check_count(p.R, "rows", kOp);
  if (p.R == 0) return;
  const OnDevice device(stream.device, kOp);
  with_type(p.dtype, [&](auto value) {
    using T = decltype(value);
    p.cache_dtype == DType::kInt8 ? run<T, Int8>(p, stream) : run<T, Float8>(p, stream);
  });
}

}  // namespace toca::cuda
