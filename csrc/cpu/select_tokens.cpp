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

using Keys = Buffer<uint32_t>;

// Writes the keys of row r and returns how many of its scores are NaN.
int32_t rank_row(const SelectTokens& p, int64_t r, uint32_t* key) {
  const float* score = p.score + r * p.N;
  const int32_t* age = p.age + r * p.N;
  int32_t nan = 0;
  for (int64_t n = 0; n < p.N; ++n) {
    const float total = aged_score(score[n], age[n], p.age_weight);
    nan += !(total == total);
    key[n] = order_key(total);
  }
  return nan;
}

// Tiles are cut short at the border.
void reward_tiles(const SelectTokens& p, uint32_t* key) {
  for (int64_t f = 0; f < p.frames; ++f, key += p.rows * p.cols)
    for (int64_t y0 = 0; y0 < p.rows; y0 += p.cell)
      for (int64_t x0 = 0; x0 < p.cols; x0 += p.cell) reward_tile(p, y0, x0, key);
}

// The k-th largest key, 1 <= k <= N, and how many tokens with exactly that key belong to the top k.
struct Threshold {
  uint32_t key;
  int64_t ties;
};

Threshold threshold_of(Keys& keys, int64_t N, int64_t k) {
  uint32_t prefix = 0, mask = 0;
  int64_t need = k;
  for (int shift = 32 - kBits; shift >= 0; shift -= kBits) {
    uint32_t histogram[kBuckets] = {};
    for (int64_t n = 0; n < N; ++n)
      if ((keys[n] & mask) == prefix) ++histogram[keys[n] >> shift & (kBuckets - 1)];
    uint32_t bucket = kBuckets - 1;
    while (int64_t(histogram[bucket]) < need) need -= histogram[bucket--];
    prefix |= bucket << shift;
    mask |= (kBuckets - 1) << shift;
  }
  return {prefix, need};
}

void select_row(const SelectTokens& p, int64_t r, Keys& keys) {
  const int64_t N = p.N;
  const Slots slots = slots_of(p, r);
  int32_t* age = p.age + r * N;
  int32_t* inverse = p.inverse + r * N;
  int64_t* index = p.index + slots.first;
  p.nan[r] = rank_row(p, r, keys.data());
  if (slots.count == 0) {
    for (int64_t n = 0; n < N; ++n) inverse[n] = -1, ++age[n];
    return;
  }
  if (has_reward(p)) reward_tiles(p, keys.data());
  const Threshold t = threshold_of(keys, N, slots.count);
  int32_t slot = 0;
  int64_t ties = t.ties;
  for (int64_t n = 0; n < N; ++n) {
    const bool chosen = keys[n] > t.key || (keys[n] == t.key && ties-- > 0);
    inverse[n] = chosen ? slot : -1;
    age[n] = chosen ? 0 : age[n] + 1;
    if (chosen) index[slot++] = n;
  }
}

}  // namespace

void select_tokens(const SelectTokens& p) {
  const int64_t rows_worth_a_thread = 1 + 2048 / (p.N + 1);
  parallel_for(p.R, rows_worth_a_thread, p.threads, [&](int64_t begin, int64_t end) {
    Keys keys(p.N);
    for (int64_t r = begin; r < end; ++r) select_row(p, r, keys);
  });
}

}  // namespace toca::cpu::TOCA_ISA
