// gather_modulate: residual + LayerNorm/RMSNorm + modulation of the selected rows.
//
// Fused: gather, x + gate * cache (which may be held in 8 bits, or extrapolated), mean and
// variance, affine, modulation; one read of the k rows, one write.  A row stays in a float32 buffer
// in L1 between its passes.  Limited by memory for few rows and by the conversions for 16-bit
// dtypes; rows are independent, so they are the threads' work.
#include "../toca.h"
#include "eight_bit.h"
#include "forecast.h"
#include "parallel.h"
#include "vec.h"

namespace toca::cpu::TOCA_ISA {
namespace {

template <class T>
const T* row_of(const RowsView& view, int64_t b, int64_t n) {
  return (const T*)view.data + b * view.stride_b + n * view.stride_n;
}

// x + gate * cache of a row into the buffer; returns the sum of its channels, lane by lane.
template <class T>
Vec residual_row(const GatherModulate& p, int64_t b, int64_t n, float* buffer) {
  const int64_t C = p.C, row = b * p.N + n;
  const T* x = (const T*)p.x + row * C;
  Vec total = splat(0.f);
  if (!p.cache) {
    for_row(C, [&](int64_t c, auto load, auto) {
      const Vec v = load(x);
      store(buffer + c, v);
      total += v;
    });
    return total;
  }
  const T* gate = p.gate.data ? row_of<T>(p.gate, b, n) : nullptr;
  const auto add = [&](auto cache) {
    for_row(C, [&](int64_t c, auto load, auto) {
      const Vec v = load(x) + (gate ? load(gate) * cache(load) : cache(load));
      store(buffer + c, v);
      total += v;
    });
  };
  if (p.forecast.slopes)
    with_forecast<T>(p.cache, p.forecast, row, C, add);
  else
    with_row<T>(p.cache, p.cache_scale, p.cache_dtype, row, C, add);
  return total;
}

template <class T>
void normalise_row(const GatherModulate& p, int64_t b, int64_t n, float* buffer, T* out) {
  const int64_t C = p.C;
  const Vec total = residual_row<T>(p, b, n, buffer);
  const float mean = p.rms ? 0.f : sum(total) / float(C);
  for (int64_t c = C; c % kVec; ++c) buffer[c] = mean;  // the lanes past C add no variance
  Vec squares = splat(0.f);
  for (int64_t c = 0; c < C; c += kVec) {
    const Vec d = load(buffer + c) - mean;
    squares += d * d;
  }
  const float rstd = 1.f / std::sqrt(sum(squares) / float(C) + p.eps);
  const T* shift = row_of<T>(p.shift, b, n);
  const T* scale = row_of<T>(p.scale, b, n);
  const T* weight = (const T*)p.weight;
  const T* bias = (const T*)p.bias;
  for_row(C, [&](int64_t c, auto load, auto put) {
    Vec v = (toca::cpu::TOCA_ISA::load(buffer + c) - mean) * rstd;
    if (weight) v *= load(weight);
    if (bias) v += load(bias);
    put(out, v * (1.f + load(scale)) + load(shift));
  });
}

template <class T>
void run(const GatherModulate& p) {
  parallel_for(p.B * p.k, 4, p.threads, [&](int64_t begin, int64_t end) {
    Buffer<float> buffer(p.C + kVec);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t b = r / p.k, n = p.index ? p.index[r] : r - b * p.k;
      normalise_row(p, b, n, buffer.data(), (T*)p.out + r * p.C);
    }
  });
}

}  // namespace

void gather_modulate(const GatherModulate& p) {
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
