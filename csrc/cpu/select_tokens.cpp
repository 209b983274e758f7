// select_tokens: score + age, tile bonus, top k, compaction and ages of a row in one go.
//
// One row (a layer of a sample) is one thread's work and stays in L1/L2: keys are ranked by radix
// select (four digits of 8 bits), so the cost is linear in N whatever k is, and nothing is sorted.
// Compiled without contraction of a * b + c: the sums must be the reference's, bit for bit.
#include "../order.h"
#include "../toca.h"
#include "parallel.h"
#include "vec.h"

namespace toca::cpu::TOCA_ISA {
namespace {

constexpr int kBits = 8;  // of a digit of the radix select
constexpr uint32_t kBuckets = 1u << kBits;

struct Scratch {
  Buffer<float> total;
  Buffer<uint32_t> key;
  explicit Scratch(int64_t N) : total(N), key(N) {}
};

int32_t score_row(const SelectTokens& p, int64_t r, float* total) {
  const float* score = p.score + r * p.N;
  const int32_t* age = p.age + r * p.N;
  int32_t nan = 0;
  for (int64_t n = 0; n < p.N; ++n) {
    total[n] = score[n] + p.age_weight * float(age[n]);
    nan += !(total[n] == total[n]);
  }
  return nan;
}

// The first maximum of every tile, cut short at the border, gets its bonus.
void reward_tiles(const SelectTokens& p, float* total) {
  const float factor = 1.f + p.bonus;
  for (int64_t f = 0; f < p.frames; ++f, total += p.rows * p.cols)
    for (int64_t y0 = 0; y0 < p.rows; y0 += p.cell)
      for (int64_t x0 = 0; x0 < p.cols; x0 += p.cell) {
        int64_t best = y0 * p.cols + x0;
        uint32_t best_key = order_key(total[best]);
        for (int64_t y = y0; y < std::min(y0 + p.cell, p.rows); ++y)
          for (int64_t x = x0; x < std::min(x0 + p.cell, p.cols); ++x) {
            const uint32_t key = order_key(total[y * p.cols + x]);
            if (key > best_key) best = y * p.cols + x, best_key = key;
          }
        total[best] *= factor;
      }
}

// The k-th largest key, 1 <= k <= N, and how many tokens with exactly that key belong to the top k.
struct Threshold {
  uint32_t key;
  int64_t ties;
};

Threshold threshold_of(Scratch& s, int64_t N, int64_t k) {
  uint32_t prefix = 0, mask = 0;
  int64_t need = k;
  for (int shift = 32 - kBits; shift >= 0; shift -= kBits) {
    uint32_t histogram[kBuckets] = {};
    for (int64_t n = 0; n < N; ++n)
      if ((s.key[n] & mask) == prefix) ++histogram[s.key[n] >> shift & (kBuckets - 1)];
    uint32_t bucket = kBuckets - 1;
    while (int64_t(histogram[bucket]) < need) need -= histogram[bucket--];
    prefix |= bucket << shift;
    mask |= (kBuckets - 1) << shift;
  }
  return {prefix, need};
}

void select_row(const SelectTokens& p, int64_t r, Scratch& s) {
  const int64_t N = p.N, k = p.offsets[r + 1] - p.offsets[r];
  int32_t* age = p.age + r * N;
  int32_t* inverse = p.inverse + r * N;
  int64_t* index = p.index + p.offsets[r];
  p.nan[r] = score_row(p, r, s.total.data());
  if (k == 0) {
    for (int64_t n = 0; n < N; ++n) inverse[n] = -1, ++age[n];
    return;
  }
  if (p.cell > 1 && p.bonus != 0.f) reward_tiles(p, s.total.data());
  for (int64_t n = 0; n < N; ++n) s.key[n] = order_key(s.total[n]);
  const Threshold t = threshold_of(s, N, k);
  int32_t slot = 0;
  int64_t ties = t.ties;
  for (int64_t n = 0; n < N; ++n) {
    const bool chosen = s.key[n] > t.key || (s.key[n] == t.key && ties-- > 0);
    inverse[n] = chosen ? slot : -1;
    age[n] = chosen ? 0 : age[n] + 1;
    if (chosen) index[slot++] = n;
  }
}

}  // namespace

void select_tokens(const SelectTokens& p) {
  const int64_t rows_worth_a_thread = 1 + 2048 / (p.N + 1);
  parallel_for(p.R, rows_worth_a_thread, p.threads, [&](int64_t begin, int64_t end) {
    Scratch scratch(p.N);
    for (int64_t r = begin; r < end; ++r) select_row(p, r, scratch);
  });
}

}  // namespace toca::cpu::TOCA_ISA
