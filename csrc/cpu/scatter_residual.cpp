// scatter_residual: fresh rows into their caches, every gated cache into the residual.
//
// Fused: scatter, gates and residual adds of up to four caches, in one pass over the tokens; each
// fresh row is found through the inverse map, moved to its cache bit by bit (or rounded, where the
// cache is held in 8 bits), and then still near.  A cache that is extrapolated gets the differences
// of a fresh row too; any other row is extrapolated where it is added.
// Limited by memory: one read of x and of each cache, one write of x, and of the fresh rows.
#include "../toca.h"
#include "eight_bit.h"
#include "forecast.h"
#include "parallel.h"
#include "vec.h"

namespace toca::cpu::TOCA_ISA {
namespace {

template <class T>
const T* gate_of(const ResidualUpdate& u, int64_t b, int64_t n) {
  return u.gate.data ? (const T*)u.gate.data + b * u.gate.stride_b + n * u.gate.stride_n : nullptr;
}

// The fresh row of a token; nullptr: its cache is kept.
template <class T>
const T* fresh_of(const ResidualUpdate& u, int64_t b, int64_t row, int64_t C) {
  const int32_t slot = u.fresh && u.k > 0 ? u.inverse[row] : -1;
  return slot >= 0 ? (const T*)u.fresh + (b * u.k + slot) * C : nullptr;
}

// The row of one update that is added to a token: of the cache, or its fresh value.
template <class T>
struct Source {
  using Value = T;
  const T* gate;       // nullptr: 1
  const void* values;  // of T where there is no scale
  const float* scale;
  DType dtype;  // of 8-bit values

  template <class Body>
  void visit(Body body) const {
    with_row<T>(values, scale, dtype, 0, 0, body);
  }
};

// Moves a fresh row into its cache: bit by bit, or rounded to 8 bits.
template <class T>
void refresh(const ResidualUpdate& u, int64_t row, const T* fresh, int64_t C) {
  if (!u.cache_scale)
    std::memcpy((T*)u.cache + row * C, fresh, C * sizeof(T));
  else if (u.cache_dtype == DType::kInt8)
    u.cache_scale[row] = store_row(fresh, (i8*)u.cache + row * C, C);
  else
    u.cache_scale[row] = store_row(fresh, (f8*)u.cache + row * C, C);
}

template <class T>
void source_of(const ResidualUpdate& u, int64_t b, int64_t n, int64_t row, int64_t C,
               Source<T>* source) {
  const T* gate = gate_of<T>(u, b, n);
  if (const T* fresh = fresh_of<T>(u, b, row, C)) {
    refresh(u, row, fresh, C);
    *source = {gate, fresh, nullptr, DType{}};
  } else if (!u.cache_scale) {
    *source = {gate, (const T*)u.cache + row * C, nullptr, DType{}};
  } else {
    *source = {gate, (const int8_t*)u.cache + row * C, u.cache_scale + row, u.cache_dtype};
  }
}

// The same where a cache is extrapolated.
template <class T>
struct ForecastSource {
  using Value = T;
  const T* gate;
  const void* values;
  const Forecast* forecast;  // nullptr: a plain row, the first of `values`
  int64_t row, C;

  template <class Body>
  void visit(Body body) const {
    if (forecast)
      with_forecast<T>(values, *forecast, row, C, body);
    else
      body(Row<T>{(const T*)values, 1.f});
  }
};

template <class T>
void source_of(const ResidualUpdate& u, int64_t b, int64_t n, int64_t row, int64_t C,
               ForecastSource<T>* source) {
  const T* gate = gate_of<T>(u, b, n);
  if (const T* fresh = fresh_of<T>(u, b, row, C)) {
    if (u.forecast.slopes)
      store_forecast(fresh, u.cache, u.forecast, row, C);
    else
      std::memcpy((T*)u.cache + row * C, fresh, C * sizeof(T));
    *source = {gate, fresh, nullptr, row, C};
  } else if (u.forecast.order) {
    *source = {gate, u.cache, &u.forecast, row, C};
  } else {
    *source = {gate, (const T*)u.cache + row * C, nullptr, row, C};
  }
}

// The most common forms get loops without branches inside; the last serves everything.
template <class Source, class T = typename Source::Value>
void add_row(const Source* s, int count, const T* x, T* out, int64_t C) {
  if (count == 2 && s[0].gate && s[1].gate) {
    const T *gate_a = s[0].gate, *gate_m = s[1].gate;
    s[0].visit([&](auto a) {
      s[1].visit([&](auto m) {
        for_row(C, [&](int64_t, auto load, auto put) {
          put(out, load(x) + load(gate_a) * a(load) + load(gate_m) * m(load));
        });
      });
    });
    return;
  }
  if (count == 1) {
    const T* gate = s[0].gate;
    s[0].visit([&](auto row) {
      for_row(C, [&](int64_t, auto load, auto put) {
        put(out, load(x) + (gate ? load(gate) * row(load) : row(load)));
      });
    });
    return;
  }
  for_row(C, [&](int64_t, auto load, auto put) {
    Vec total = load(x);
    for (int u = 0; u < count; ++u)
      s[u].visit([&](auto row) { total += s[u].gate ? load(s[u].gate) * row(load) : row(load); });
    put(out, total);
  });
}

template <class Source, class T = typename Source::Value>
void run_rows(const ScatterResidual& p) {
  parallel_for(p.B * p.N, 8, p.threads, [&](int64_t begin, int64_t end) {
    Source sources[kMaxUpdates];
    for (int64_t r = begin; r < end; ++r) {
      const int64_t b = r / p.N, n = r - b * p.N;
      for (int u = 0; u < p.updates; ++u) source_of(p.update[u], b, n, r, p.C, &sources[u]);
      add_row(sources, p.updates, (const T*)p.x + r * p.C, (T*)p.out + r * p.C, p.C);
    }
  });
}

template <class T>
void run(const ScatterResidual& p) {
  for (int u = 0; u < p.updates; ++u)
    if (p.update[u].forecast.slopes) return run_rows<ForecastSource<T>>(p);
  run_rows<Source<T>>(p);
}

}  // namespace

void scatter_residual(const ScatterResidual& p) {
  for (int u = 0; u < p.updates; ++u) {
    const ResidualUpdate& update = p.update[u];
    if (!update.inverse) continue;
    for (int64_t r = 0; r < p.B * p.N; ++r)
      if (update.inverse[r] < -1 || update.inverse[r] >= update.k)
        throw OutOfRange{update.inverse[r], -1, update.k};
  }
  switch (p.dtype) {
    case DType::kFloat32: return run<float>(p);
    case DType::kBFloat16: return run<bf16>(p);
    case DType::kFloat16: return run<f16>(p);
    default: return;  // not the dtype of features
  }
}

}  // namespace toca::cpu::TOCA_ISA
