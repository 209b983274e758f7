// scatter_residual: fresh rows into their caches, every gated cache into the residual.
//
// Fused: scatter, gates and residual adds of up to four caches, in one pass over the tokens; each
// fresh row is found through the inverse map, moved to its cache bit by bit (or rounded, where the
// cache is held in 8 bits), and then still near.
// Limited by memory: one read of x and of each cache, one write of x, and of the fresh rows.
#include "../toca.h"
#include "eight_bit.h"
#include "parallel.h"
#include "vec.h"

namespace toca::cpu::TOCA_ISA {
namespace {

// The row of one update that is added to a token: of the cache, or its fresh value.
template <class T>
struct Source {
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
Source<T> source_of(const ResidualUpdate& u, int64_t b, int64_t n, int64_t N, int64_t C) {
  const T* gate =
      u.gate.data ? (const T*)u.gate.data + b * u.gate.stride_b + n * u.gate.stride_n : nullptr;
  const int64_t row = b * N + n;
  const int32_t slot = u.fresh && u.k > 0 ? u.inverse[row] : -1;
  if (slot >= 0) {
    const T* fresh = (const T*)u.fresh + (b * u.k + slot) * C;
    refresh(u, row, fresh, C);
    return {gate, fresh, nullptr, DType{}};
  }
  if (!u.cache_scale) return {gate, (const T*)u.cache + row * C, nullptr, DType{}};
  return {gate, (const int8_t*)u.cache + row * C, u.cache_scale + row, u.cache_dtype};
}

// The most common forms get loops without branches inside; the last serves everything.
template <class T>
void add_row(const Source<T>* s, int count, const T* x, T* out, int64_t C) {
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

template <class T>
void run(const ScatterResidual& p) {
  parallel_for(p.B * p.N, 8, p.threads, [&](int64_t begin, int64_t end) {
    Source<T> sources[kMaxUpdates];
    for (int64_t r = begin; r < end; ++r) {
      const int64_t b = r / p.N, n = r - b * p.N;
      for (int u = 0; u < p.updates; ++u) sources[u] = source_of<T>(p.update[u], b, n, p.N, p.C);
      add_row(sources, p.updates, (const T*)p.x + r * p.C, (T*)p.out + r * p.C, p.C);
    }
  });
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
