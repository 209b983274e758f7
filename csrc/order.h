// The order of select_tokens: score of a token, key of a score, tie rule, tiles of the grid.
//
// Kept apart from the bodies so that every one of them ranks alike, bit for bit, on the CPU and in
// CUDA.  Whoever includes this is compiled without contraction of a * b + c.
#pragma once

#include <cstdint>
#include <cstring>

#include "toca.h"

#if defined(__CUDACC__)
#define TOCA_HD __host__ __device__
#else
#define TOCA_HD
#endif

namespace toca {

// Where a row of the selection lies in `index`.
struct Slots {
  int64_t first, count;
};

TOCA_HD static inline Slots slots_of(const SelectTokens& p, int64_t r) {
  if (!p.offsets) return {r * p.k, p.k};
  return {p.offsets[r], p.offsets[r + 1] - p.offsets[r]};
}

TOCA_HD static inline float aged_score(float score, int32_t age, float age_weight) {
  return score + age_weight * float(age);
}

// A monotone map of float32 to uint32: larger score, larger key.  NaN ranks with -infinity; -0 and
// +0 are equal.  Equal keys are ordered by position, the lower first.
TOCA_HD static inline uint32_t order_key(float score) {
  if (!(score == score)) return 0x007fffffu;  // the key of -infinity
  score += 0.f;                               // -0 becomes +0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// The score of a key.
TOCA_HD static inline float order_value(uint32_t key) {
  const uint32_t bits = key ^ (key >> 31 ? 0x80000000u : 0xffffffffu);
  float score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

TOCA_HD static inline bool has_reward(const SelectTokens& p) {
  return p.cell > 1 && p.bonus != 0.f;
}

// The first maximum of the tile whose first token is (y0, x0) gets its bonus.  `key`: of one frame,
// whose tokens Int can count.
template <class Int>
TOCA_HD static inline void reward_tile(const SelectTokens& p, Int y0, Int x0, uint32_t* key) {
  const Int rows = Int(p.rows), cols = Int(p.cols), cell = Int(p.cell);
  const Int y1 = y0 + cell < rows ? y0 + cell : rows;
  const Int x1 = x0 + cell < cols ? x0 + cell : cols;
  Int best = y0 * cols + x0;
  for (Int y = y0; y < y1; ++y)
    for (Int x = x0; x < x1; ++x)
      if (key[y * cols + x] > key[best]) best = y * cols + x;
  key[best] = order_key(order_value(key[best]) * (1.f + p.bonus));
}

}  // namespace toca
