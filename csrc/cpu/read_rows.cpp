// read_rows: what a cache stands for, in the features' dtype.
//
// Fused: gather, scale or extrapolation, rounding.  Limited by memory: one read of the rows (and of
// their slopes), one write; rows are independent, so they are the threads' work.
#include "../toca.h"
#include "eight_bit.h"
#include "forecast.h"
#include "parallel.h"

namespace toca::cpu::TOCA_ISA {
namespace {

template <class T>
void run(const ReadRows& p) {
  parallel_for(p.B * p.k, 8, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t b = r / p.k, row = b * p.N + (p.index ? p.index[r] : r - b * p.k);
      T* out = (T*)p.out + r * p.C;
      const auto copy = [&](auto cached) {
        for_row(p.C, [&](int64_t, auto load, auto put) { put(out, cached(load)); });
      };
      if (p.forecast.slopes)
        with_forecast<T>(p.cache, p.forecast, row, p.C, copy);
      else if (p.cache_scale)
        with_row<T>(p.cache, p.cache_scale, p.cache_dtype, row, p.C, copy);
      else
        std::memcpy(out, (const T*)p.cache + row * p.C, p.C * sizeof(T));
    }
  });
}

}  // namespace

void read_rows(const ReadRows& p) {
  if (p.index)
    for (int64_t r = 0; r < p.B * p.k; ++r)
      if (p.index[r] < 0 || p.index[r] >= p.N) throw OutOfRange{p.index[r], 0, p.N};
  switch (p.dtype) {
    case DType::kFloat32: return run<float>(p);
    case DType::kBFloat16: return run<bf16>(p);
    case DType::kFloat16: return run<f16>(p);
    default: return;  // not the dtype of features
  }
}

}  // namespace toca::cpu::TOCA_ISA
