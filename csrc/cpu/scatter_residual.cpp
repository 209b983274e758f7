// scatter_residual: fresh rows into their caches, every gated cache into the residual.
//
// Fused: scatter, gates and residual adds of up to four caches, in one pass over the tokens; each
// fresh row is found through the inverse map, moved to its cache bit by bit, and then still near.
// Limited by memory: one read of x and of each cache, one write of x, and of the fresh rows.
#include "../toca.h"
#include "parallel.h"
#include "vec.h"

namespace toca::cpu::TOCA_ISA {
namespace {

template <class T>
struct Source {
  const T* gate;  // nullptr: 1
  const T* value;
};

// The row of token n, after its fresh value, if there is one, was moved to the cache.
template <class T>
Source<T> source_of(const ResidualUpdate& u, int64_t b, int64_t n, int64_t N, int64_t C) {
  const T* gate =
      u.gate.data ? (const T*)u.gate.data + b * u.gate.stride_b + n * u.gate.stride_n : nullptr;
  T* cache = (T*)u.cache + (b * N + n) * C;
  const int32_t slot = u.fresh && u.k > 0 ? u.inverse[b * N + n] : -1;
  if (slot >= 0) std::memcpy(cache, (const T*)u.fresh + (b * u.k + slot) * C, C * sizeof(T));
  return {gate, cache};
}

// The most common form gets a loop without branches inside; the other serves everything.
template <class T>
void add_row(const Source<T>* s, int count, const T* x, T* out, int64_t C) {
  if (count == 2 && s[0].gate && s[1].gate) {
    const Source<T> a = s[0], m = s[1];
    for_row(C, [&](int64_t, auto load, auto put) {
      put(out, load(x) + load(a.gate) * load(a.value) + load(m.gate) * load(m.value));
    });
    return;
  }
  for_row(C, [&](int64_t, auto load, auto put) {
    Vec total = load(x);
    for (int u = 0; u < count; ++u)
      total += s[u].gate ? load(s[u].gate) * load(s[u].value) : load(s[u].value);
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
  }
}

}  // namespace toca::cpu::TOCA_ISA
