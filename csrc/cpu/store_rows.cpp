// store_rows: the rows of a full step into an 8-bit cache, or one that is extrapolated.
//
// Fused: the largest magnitude of a row, its scale, rounding; or its differences and the copy.  One
// read (the second of a row is from L1) and one write.  Limited by memory; rows are independent, so
// they are the threads' work.
#include "../toca.h"
#include "eight_bit.h"
#include "forecast.h"
#include "parallel.h"

namespace toca::cpu::TOCA_ISA {
namespace {

template <class Q, class T>
void run(const StoreRows& p) {
  parallel_for(p.R, 8, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      p.scale[r] = store_row((const T*)p.rows + r * p.C, (Q*)p.values + r * p.C, p.C);
  });
}

template <class T>
void run_forecast(const StoreRows& p) {
  parallel_for(p.R, 8, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      store_forecast((const T*)p.rows + r * p.C, p.values, p.forecast, r, p.C);
  });
}

template <class T>
void run(const StoreRows& p) {
  if (p.forecast.slopes) return run_forecast<T>(p);
  p.cache_dtype == DType::kInt8 ? run<i8, T>(p) : run<f8, T>(p);
}

}  // namespace

void store_rows(const StoreRows& p) {
  switch (p.dtype) {
    case DType::kFloat32: return run<float>(p);
    case DType::kBFloat16: return run<bf16>(p);
    case DType::kFloat16: return run<f16>(p);
    default: return;  // not the dtype of features
  }
}

}  // namespace toca::cpu::TOCA_ISA
