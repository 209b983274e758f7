// The order of select_tokens: key of a score, tie rule, tiles of the grid.
//
// Kept apart from the bodies so that every one of them ranks alike, bit for bit.
#pragma once

#include <cstdint>
#include <cstring>

namespace toca {

// A monotone map of float32 to uint32: larger score, larger key.  NaN ranks with -infinity; -0 and
// +0 are equal.  Equal keys are ordered by position, the lower first.
static inline uint32_t order_key(float score) {
  if (!(score == score)) return 0x007fffffu;  // the key of -infinity
  score += 0.f;                               // -0 becomes +0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

}  // namespace toca
