// scatter_residual: fresh rows into their caches, every gated cache into the residual, one pass.
//
// Fused: scatter, gates and residual adds of up to four caches.  A thread owns 16 bytes of a row;
// the row of each update comes from `fresh` where the inverse map says so (and goes into the cache
// while it is in registers), else from the cache.  Limited by memory: one read of x and of each
// cache or its fresh row, one write of x and of the fresh rows.  A cache is not read again before
// the next step, so its loads and stores leave the L2 to x.
//
// A cache that is extrapolated gets the differences of a fresh row; any other row is extrapolated
// where it is added.
//
// 8-bit caches need the largest magnitude of a fresh row first: there a row is a warp's work, and
// reads its fresh rows a second time, from L1.
#include "eight_bit.cuh"
#include "forecast.cuh"

namespace toca::cuda {
namespace {

constexpr const char* kOp = "scatter_residual";
constexpr int kThreads = 256;  // of a CTA of narrow rows
constexpr int kMostThreads = 512;
constexpr int kFewUpdates = 2;   // of a cached step: they need fewer registers than four
constexpr int kRowsOfWarps = 8;  // of a CTA, where a row is a warp's

struct Token {
  int64_t row, b, n;  // row = b * N + n
};

__device__ Token token_of(const ScatterResidual& p, int row) {
  const int N = int(p.N), b = row / N;
  return {row, b, row - b * N};
}

// The row of `fresh` for a token; -1: its cache is kept, as it is for a slot out of range.
__device__ int64_t slot_of(const ResidualUpdate& u, const Token& token) {
  if (!u.fresh) return -1;
  const int32_t slot = u.inverse[token.row];
  return slot < u.k ? slot : -1;
}

template <class T>
__device__ const T* fresh_row(const ResidualUpdate& u, const Token& token, int64_t slot,
                              int64_t C) {
  return static_cast<const T*>(u.fresh) + (token.b * u.k + slot) * C;
}

template <class T>
__device__ const T* gate_row(const ResidualUpdate& u, const Token& token) {
  return u.gate.data ? row_of<T>(u.gate, token.b, token.n) : nullptr;
}

// --- caches of x's dtype -------------------------------------------------------------------------

// One pack of one row, of at most kMost updates: all loads are under way before one is used.
template <class T, int kVec, int kMost>
__device__ void add_pack(const ScatterResidual& p, const Token& token, int c) {
  const int64_t at = token.row * p.C + c;
  int64_t slot[kMost];
#pragma unroll
  for (int u = 0; u < kMost; ++u)
    if (u < p.updates) slot[u] = slot_of(p.update[u], token);

  const auto x = load<kVec>(static_cast<const T*>(p.x) + at);
  Pack<T, kVec> value[kMost], gate[kMost];
#pragma unroll
  for (int u = 0; u < kMost; ++u) {
    if (u >= p.updates) continue;
    const ResidualUpdate& update = p.update[u];
    const T* source = slot[u] >= 0 ? fresh_row<T>(update, token, slot[u], p.C) + c
                                   : static_cast<const T*>(update.cache) + at;
    value[u] = load_once<kVec>(source);
    if (const T* gates = gate_row<T>(update, token)) gate[u] = load<kVec>(gates + c);
  }

  float total[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) total[i] = to_float(x.value[i]);
#pragma unroll
  for (int u = 0; u < kMost; ++u) {
    if (u >= p.updates) continue;
    const ResidualUpdate& update = p.update[u];
    if (slot[u] >= 0) store_once(static_cast<T*>(update.cache) + at, value[u]);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float cached = to_float(value[u].value[i]);
      total[i] += update.gate.data ? to_float(gate[u].value[i]) * cached : cached;
    }
  }
  Pack<T, kVec> out;
#pragma unroll
  for (int i = 0; i < kVec; ++i) out.value[i] = from_float<T>(total[i]);
  store(static_cast<T*>(p.out) + at, out);
}

// The same where some caches are extrapolated: two updates at a time, for want of registers.
template <class T, int kVec>
__device__ void add_two_forecasts(const ScatterResidual& p, const Token& token, int c, int first,
                                  float* total) {
  const int64_t at = token.row * p.C + c;
  int64_t slot[2];
#pragma unroll
  for (int u = 0; u < 2; ++u)
    if (first + u < p.updates) slot[u] = slot_of(p.update[first + u], token);

  Pack<T, kVec> value[2], gate[2];
  Around<T, kVec> around[2];
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    if (first + u >= p.updates) continue;
    const ResidualUpdate& update = p.update[first + u];
    const T* source = slot[u] >= 0 ? fresh_row<T>(update, token, slot[u], p.C) + c
                                   : static_cast<const T*>(update.cache) + at;
    value[u] = load_once<kVec>(source);
    if (update.forecast.slopes)
      around[u] = load_around<kVec, T>(update.forecast, update.cache, at, slot[u] >= 0);
    if (const T* gates = gate_row<T>(update, token)) gate[u] = load<kVec>(gates + c);
  }

#pragma unroll
  for (int u = 0; u < 2; ++u) {
    if (first + u >= p.updates) continue;
    const ResidualUpdate& update = p.update[first + u];
    const Forecast& forecast = update.forecast;
    float cached[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) cached[i] = to_float(value[u].value[i]);
    if (forecast.slopes) {
      const float d = forecast.distance[token.row];
      if (slot[u] >= 0)
        store_forecast(forecast, d, around[u], value[u], update.cache, at);
      else
        extrapolate(forecast, d, around[u], cached);
    } else if (slot[u] >= 0) {
      store_once(static_cast<T*>(update.cache) + at, value[u]);
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      total[i] += update.gate.data ? to_float(gate[u].value[i]) * cached[i] : cached[i];
  }
}

template <class T, int kVec>
__device__ void add_forecast_pack(const ScatterResidual& p, const Token& token, int c) {
  const int64_t at = token.row * p.C + c;
  const auto x = load<kVec>(static_cast<const T*>(p.x) + at);
  float total[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) total[i] = to_float(x.value[i]);
#pragma unroll 1
  for (int first = 0; first < p.updates; first += 2)
    add_two_forecasts<T, kVec>(p, token, c, first, total);
  Pack<T, kVec> out;
#pragma unroll
  for (int i = 0; i < kVec; ++i) out.value[i] = from_float<T>(total[i]);
  store(static_cast<T*>(p.out) + at, out);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kMostThreads, 1)
    scatter_forecast_kernel(ScatterResidual p, int rows_of_cta) {
  const int packs = int(p.C / kVec), first = blockIdx.x * rows_of_cta;
  const int rows = min(rows_of_cta, int(p.B * p.N) - first);
  for (int i = threadIdx.x; i < rows * packs; i += blockDim.x) {
    const int row = i / packs;
    add_forecast_pack<T, kVec>(p, token_of(p, first + row), (i - row * packs) * kVec);
  }
}

template <class T, int kVec, int kMost>
__global__ void __launch_bounds__(kMostThreads, 1)
    scatter_residual_kernel(ScatterResidual p, int rows_of_cta) {
  const int packs = int(p.C / kVec), first = blockIdx.x * rows_of_cta;
  const int rows = min(rows_of_cta, int(p.B * p.N) - first);
  for (int i = threadIdx.x; i < rows * packs; i += blockDim.x) {
    const int row = i / packs;
    add_pack<T, kVec, kMost>(p, token_of(p, first + row), (i - row * packs) * kVec);
  }
}

bool has_forecast(const ScatterResidual& p) {
  for (int u = 0; u < p.updates; ++u)
    if (p.update[u].forecast.slopes) return true;
  return false;
}

template <class T, int kVec>
void run(const ScatterResidual& p, const Stream& stream) {
  const int packs = int(p.C / kVec), rows = packs < kThreads ? kThreads / packs : 1;
  const int threads = div_up(rows * packs, kWarp) * kWarp;
  const Shape shape{dim3(unsigned(div_up(p.B * p.N, int64_t(rows)))),
                    dim3(unsigned(threads < kMostThreads ? threads : kMostThreads))};
  launch(kOp, stream, shape,
         has_forecast(p)            ? scatter_forecast_kernel<T, kVec>
         : p.updates <= kFewUpdates ? scatter_residual_kernel<T, kVec, kFewUpdates>
                                    : scatter_residual_kernel<T, kVec, kMaxUpdates>,
         p, rows);
}

// --- 8-bit caches --------------------------------------------------------------------------------

// The row of one update that is added to a token: of the cache, or its fresh value.
template <class T>
struct Source {
  const T* gate;   // nullptr: 1
  const T* plain;  // nullptr: in the cache, in 8 bits
};

// The source of an update, after its fresh row, if there is one, was written to the cache.
template <class T, int kVec>
__device__ Source<T> source_of(const ResidualUpdate& u, const Token& token, int C) {
  const T* gate = gate_row<T>(u, token);
  const int64_t slot = slot_of(u, token), first = token.row * C;
  T* plain = u.cache_scale ? nullptr : static_cast<T*>(u.cache) + first;
  if (slot < 0) return {gate, plain};  // the whole warp
  const T* fresh = fresh_row<T>(u, token, slot, C);
  if (plain) {
    for (int c = threadIdx.x % kWarp * kVec; c < C; c += kWarp * kVec)
      store_once(plain + c, load<kVec>(fresh + c));
  } else if (u.cache_dtype == DType::kInt8) {
    store_row<kVec>(fresh, static_cast<Int8*>(u.cache) + first, u.cache_scale + token.row, C);
  } else {
    store_row<kVec>(fresh, static_cast<Float8*>(u.cache) + first, u.cache_scale + token.row, C);
  }
  return {gate, fresh};
}

template <class T, int kVec>
__global__ void __launch_bounds__(kRowsOfWarps* kWarp, 1)
    scatter_residual_8bit_kernel(ScatterResidual p) {
  const int row = blockIdx.x * kRowsOfWarps + threadIdx.x / kWarp;
  if (row >= int(p.B * p.N)) return;  // the whole warp
  const Token token = token_of(p, row);
  const int C = int(p.C);
  Source<T> source[kMaxUpdates];
#pragma unroll
  for (int u = 0; u < kMaxUpdates; ++u)
    if (u < p.updates) source[u] = source_of<T, kVec>(p.update[u], token, C);

  for (int c = threadIdx.x % kWarp * kVec; c < C; c += kWarp * kVec) {
    const int64_t at = token.row * C + c;
    const auto x = load<kVec>(static_cast<const T*>(p.x) + at);
    float total[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) total[i] = to_float(x.value[i]);
#pragma unroll
    for (int u = 0; u < kMaxUpdates; ++u) {
      if (u >= p.updates) continue;
      const ResidualUpdate& update = p.update[u];
      float cached[kVec];
      if (source[u].plain) {
        const auto pack = load<kVec>(source[u].plain + c);
#pragma unroll
        for (int i = 0; i < kVec; ++i) cached[i] = to_float(pack.value[i]);
      } else {
        load_scaled<kVec>(update.cache, update.cache_scale, update.cache_dtype, token.row, at,
                          cached);
      }
      if (source[u].gate) {
        const auto gate = load<kVec>(source[u].gate + c);
#pragma unroll
        for (int i = 0; i < kVec; ++i) cached[i] *= to_float(gate.value[i]);
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) total[i] += cached[i];
    }
    Pack<T, kVec> out;
#pragma unroll
    for (int i = 0; i < kVec; ++i) out.value[i] = from_float<T>(total[i]);
    store(static_cast<T*>(p.out) + at, out);
  }
}

template <class T, int kVec>
void run_8bit(const ScatterResidual& p, const Stream& stream) {
  const Shape shape{dim3(unsigned(div_up(p.B * p.N, int64_t(kRowsOfWarps)))),
                    dim3(kRowsOfWarps * kWarp)};
  launch(kOp, stream, shape, scatter_residual_8bit_kernel<T, kVec>, p);
}

// --- dispatch ------------------------------------------------------------------------------------

template <class T>
bool in_vectors(const ScatterResidual& p) {
  constexpr int kVec = 16 / sizeof(T);
  bool fit = p.C % kVec == 0 && fits(p.x, 16) && fits(p.out, 16);
  for (int u = 0; u < p.updates; ++u) {
    const ResidualUpdate& update = p.update[u];
    fit = fit && fits(update.cache, update.cache_scale ? kVec : 16) && fits(update.fresh, 16) &&
          fits(update.gate, 16, kVec) && fits(update.forecast, 16);
  }
  return fit;
}

bool has_8bit(const ScatterResidual& p) {
  for (int u = 0; u < p.updates; ++u)
    if (p.update[u].cache_scale) return true;
  return false;
}

template <class T, int kVec>
void choose(const ScatterResidual& p, const Stream& stream) {
  has_8bit(p) ? run_8bit<T, kVec>(p, stream) : run<T, kVec>(p, stream);
}

}  // namespace

void scatter_residual(const ScatterResidual& p, const Stream& stream) {
  check_count(p.C, "channels", kOp);
  check_count(p.B * p.N, "rows", kOp);
  if (p.B * p.N * p.C == 0) return;
  const OnDevice device(stream.device, kOp);
  with_type(p.dtype, [&](auto value) {
    using T = decltype(value);
    in_vectors<T>(p) ? choose<T, 16 / sizeof(T)>(p, stream) : choose<T, 1>(p, stream);
  });
}

}  // namespace toca::cuda
