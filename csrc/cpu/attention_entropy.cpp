// attention_entropy: entropy of the mean over heads of softmax(q k^T), for each query.
//
// A few queries are stationary: every head's keys pass by, a row of logits per query stays in L1,
// becomes weights there (by the given log-sum-exp, or by the row's own maximum and sum), and is
// added to the mean; the entropy of that is taken once.  No N x L map.  The keys of a sample are
// packed once, in memory that the caller gives, so that all threads read them.  Limited by the
// multiply-adds: half the work of the attention, plus one exp2 for each pair.
#include "../toca.h"
#include "dot.h"
#include "parallel.h"

namespace toca::cpu::TOCA_ISA {
namespace {

constexpr float kNone = -__builtin_inff();

int64_t tiles_of(const AttentionEntropy& p) { return (p.L + kKeys - 1) / kKeys; }

bool admits(const AttentionEntropy& p, int64_t b, int64_t key) {
  return key < p.L && (!p.mask || p.mask[b * p.L + key]);
}

// A tile of one head's keys; those that the mask leaves out are zeros, whatever they hold.
template <class T>
void pack_tile(const AttentionEntropy& p, int64_t b, int64_t h, int64_t tile) {
  using A = Arithmetic<T>;
  const int64_t size = A::channels(p.D) * kKeys;
  auto* packed = (typename A::Packed*)p.packed + ((b * p.H + h) * tiles_of(p) + tile) * size;
  for (int64_t i = 0; i < size; ++i) packed[i] = 0;
  const T* k = (const T*)p.k + b * p.k_b + h * p.k_h;
  for (int lane = 0; lane < kKeys; ++lane) {
    const int64_t key = tile * kKeys + lane;
    if (admits(p, b, key)) A::pack_key(k + key * p.k_n, p.D, lane, packed);
  }
}

// Scratch of a thread: for kQueries queries, rows over all keys.
template <class T>
struct Rows {
  using A = Arithmetic<T>;
  int64_t width;
  Buffer<typename A::Packed> queries;
  Buffer<float> logits, mean, bias;
  explicit Rows(const AttentionEntropy& p)
      : width(tiles_of(p) * kKeys),
        queries(A::channels(p.D) * kQueries),
        logits(kQueries * width),
        mean(kQueries * width),
        bias(width) {}
};

// logits[i, j] = scale * log2(e) * q_i . k_j of one head; -infinity where there is no key.
template <class T>
void take_logits(const AttentionEntropy& p, int64_t b, int64_t h, Rows<T>& rows) {
  using A = Arithmetic<T>;
  const int64_t channels = A::channels(p.D), tiles = tiles_of(p);
  const auto* keys = (const typename A::Packed*)p.packed + (b * p.H + h) * tiles * channels * kKeys;
  for (int64_t t = 0; t < tiles; ++t) {
    Vec dot[kQueries][kKeyVecs] = {};
    dots<A>(rows.queries.data(), keys + t * channels * kKeys, channels, dot);
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kKeyVecs; ++v) {
        const int64_t j = t * kKeys + v * kVec;
        store(rows.logits.data() + i * rows.width + j,
              dot[i][v] * (p.scale * kLog2e) + load(rows.bias.data() + j));
      }
  }
}

float largest(const float* row, int64_t width) {
  Vec most = splat(kNone);
  for (int64_t j = 0; j < width; j += kVec) {
    const Vec x = load(row + j);
    most = x > most ? x : most;
  }
  float found = kNone;
  for (int i = 0; i < kVec; ++i) found = most[i] > found ? most[i] : found;
  return found;
}

// Adds exp2(row - lse2) to the mean; where lse2 is not given it follows from the row.
void add_weights(float* row, float* mean, int64_t width, const float* lse2) {
  float shift = lse2 ? *lse2 : largest(row, width), factor = 1.f;
  if (shift == kNone) shift = 0.f;  // no key at all: every weight is 0
  if (!lse2) {
    Vec total = {};
    for (int64_t j = 0; j < width; j += kVec) {
      const Vec weight = exp2(load(row + j) - shift);
      store(row + j, weight);
      total += weight;
    }
    const float sum_of_row = sum(total);
    factor = sum_of_row > 0.f || sum_of_row != sum_of_row ? 1.f / sum_of_row : 0.f;
  }
  for (int64_t j = 0; j < width; j += kVec) {
    const Vec weight = lse2 ? exp2(load(row + j) - shift) : load(row + j) * factor;
    store(mean + j, load(mean + j) + weight);
  }
}

// ln x of normal x > 0: the exponent, and the series of artanh for the rest.
Vec natural_log(Vec x) {
  const VecI bits = bits_as<VecI>(x);
  const VecI exponent = (bits - 0x3f3504f3) >> 23;  // so that the rest lies around 1
  const Vec m = bits_as<Vec>(bits - (exponent << 23));
  const Vec t = (m - 1.f) / (m + 1.f), u = t * t;
  Vec series = splat(2.f / 9.f);
  series = series * u + 2.f / 7.f;
  series = series * u + 2.f / 5.f;
  series = series * u + 2.f / 3.f;
  series = series * u + 2.f;
  return t * series + __builtin_convertvector(exponent, Vec) * 0.693147181f;
}

float entropy_of(const float* mean, int64_t width, float heads) {
  Vec total = {};
  for (int64_t j = 0; j < width; j += kVec) {
    const Vec weight = load(mean + j) / heads;
    total -= weight * natural_log(weight + 1e-7f);
  }
  return sum(total);
}

template <class T>
void take_queries(const AttentionEntropy& p, int64_t b, int64_t first, Rows<T>& rows) {
  using A = Arithmetic<T>;
  const int64_t count = std::min<int64_t>(kQueries, p.N - first), channels = A::channels(p.D);
  for (int64_t j = 0; j < rows.width; ++j) rows.bias[j] = admits(p, b, j) ? 0.f : kNone;
  rows.mean.fill(0.f);
  for (int64_t h = 0; h < p.H; ++h) {
    const T* q = (const T*)p.q + b * p.q_b + h * p.q_h;
    const float* lse = p.lse ? p.lse + (b * p.H + h) * p.N : nullptr;
    for (int64_t i = 0; i < count; ++i)
      A::pack_query(q + (first + i) * p.q_n, p.D, rows.queries.data() + i * channels);
    take_logits<T>(p, b, h, rows);
    for (int64_t i = 0; i < count; ++i) {
      const float lse2 = lse ? lse[first + i] * kLog2e : 0.f;
      add_weights(rows.logits.data() + i * rows.width, rows.mean.data() + i * rows.width,
                  rows.width, lse ? &lse2 : nullptr);
    }
  }
  const float heads = float(std::max<int64_t>(p.H, 1));
  for (int64_t i = 0; i < count; ++i)
    p.out[b * p.N + first + i] = entropy_of(rows.mean.data() + i * rows.width, rows.width, heads);
}

template <class T>
void run(const AttentionEntropy& p) {
  const int64_t tiles = tiles_of(p), blocks = (p.N + kQueries - 1) / kQueries;
  parallel_for(p.B * p.H * tiles, 4, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      pack_tile<T>(p, t / (p.H * tiles), t / tiles % p.H, t % tiles);
  });
  parallel_for(p.B * blocks, 1, p.threads, [&](int64_t begin, int64_t end) {
    Rows<T> rows(p);
    rows.queries.fill(0);
    for (int64_t t = begin; t < end; ++t)
      take_queries<T>(p, t / blocks, t % blocks * kQueries, rows);
  });
}

}  // namespace

void attention_entropy(const AttentionEntropy& p) {
  switch (p.dtype) {
    case DType::kFloat32: run<float>(p); break;
    case DType::kBFloat16: run<bf16>(p); break;
    case DType::kFloat16: run<f16>(p); break;
    default: break;  // refused in ops.py
  }
}

}  // namespace toca::cpu::TOCA_ISA
