// attention_scores: column sums of softmax(q k^T) from the log-sum-exp of each query.
//
// Keys are stationary: a tile of keys is packed with the keys in the vector's lanes, every query
// passes by, and exp(q.k * scale - lse) is added lane by lane, so there is no horizontal sum, no
// N x N map and no atomic.  A tile of q.k (kQueries x kKeys) lives in registers.  Limited by the
// multiply-adds: half the work of attention itself, plus one exp2 for each pair.
#include "../toca.h"
#include "dot.h"
#include "parallel.h"

namespace toca::cpu::TOCA_ISA {
namespace {

// Adds exp(scale * q.k - lse) of the first `count` queries to the column sums of kKeys keys.
template <class A>
void add_queries(const typename A::Packed* queries, const typename A::Packed* keys,
                 int64_t channels, int64_t count, const float* lse2, float scale2, Vec* column) {
  Vec dot[kQueries][kKeyVecs] = {};
  dots<A>(queries, keys, channels, dot);
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i) {
    if (i >= count) break;  // not a weight of 0: infinity * 0 is NaN
#pragma GCC unroll 8
    for (int v = 0; v < kKeyVecs; ++v) column[v] += exp2(dot[i][v] * scale2 - lse2[i]);
  }
}

template <class T>
struct Tile {
  using A = Arithmetic<T>;
  Buffer<typename A::Packed> keys, queries;
  explicit Tile(int64_t D) : keys(A::channels(D) * kKeys), queries(A::channels(D) * kQueries) {}
};

// Column sums of the keys first..first+kKeys-1 of one head.
template <class T>
void sum_columns(const AttentionScores& p, int64_t b, int64_t h, int64_t first, Tile<T>& tile) {
  using A = Arithmetic<T>;
  const int64_t channels = A::channels(p.D), keys = std::min<int64_t>(kKeys, p.N - first);
  const T* k = (const T*)p.k + b * p.k_b + h * p.k_h + first * p.k_n;
  tile.keys.fill(0);
  for (int64_t j = 0; j < keys; ++j) A::pack_key(k + j * p.k_n, p.D, int(j), tile.keys.data());
  const T* q = (const T*)p.q + b * p.q_b + h * p.q_h;
  const float* lse = p.lse + (b * p.H + h) * p.Nq;
  Vec column[kKeyVecs] = {};
  for (int64_t i0 = 0; i0 < p.Nq; i0 += kQueries) {
    const int64_t count = std::min<int64_t>(kQueries, p.Nq - i0);
    float lse2[kQueries] = {};
    for (int64_t i = 0; i < count; ++i) {
      A::pack_query(q + (i0 + i) * p.q_n, p.D, tile.queries.data() + i * channels);
      lse2[i] = lse[i0 + i] * kLog2e;
    }
    add_queries<A>(tile.queries.data(), tile.keys.data(), channels, count, lse2, p.scale * kLog2e,
                   column);
  }
  float* out = p.partial + (b * p.H + h) * p.N + first;
  for (int v = 0; v < kKeyVecs; ++v)
    for (int i = 0; i < kVec && v * kVec + i < keys; ++i) out[v * kVec + i] = column[v][i];
}

template <class T>
void run(const AttentionScores& p) {
  const int64_t tiles = (p.N + kKeys - 1) / kKeys;
  parallel_for(p.B * p.H * tiles, 1, p.threads, [&](int64_t begin, int64_t end) {
    Tile<T> tile(p.D);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t bh = t / tiles;
      sum_columns<T>(p, bh / p.H, bh % p.H, t % tiles * kKeys, tile);
    }
  });
}

// Heads are added in their order, whatever the number of threads.
void mean_of_heads(const AttentionScores& p) {
  for (int64_t b = 0; b < p.B; ++b) {
    float* out = p.out + b * p.N;
    for (int64_t n = 0; n < p.N; ++n) out[n] = 0.f;
    for (int64_t h = 0; h < p.H; ++h) {
      const float* partial = p.partial + (b * p.H + h) * p.N;
      for (int64_t n = 0; n < p.N; ++n) out[n] += partial[n];
    }
    for (int64_t n = 0; n < p.N; ++n) out[n] /= float(std::max<int64_t>(p.H, 1));
  }
}

}  // namespace

void attention_scores(const AttentionScores& p) {
  switch (p.dtype) {
    case DType::kFloat32: run<float>(p); break;
    case DType::kBFloat16: run<bf16>(p); break;
    case DType::kFloat16: run<f16>(p); break;
    default: break;  // refused in ops.py
  }
  mean_of_heads(p);
}

}  // namespace toca::cpu::TOCA_ISA
