// Products of a few queries with a tile of keys, in registers: what the attention ops share.
//
// The keys of a tile are packed with the keys in the vector's lanes, so a row of products needs no
// horizontal sum.  bfloat16 on AVX512-BF16 multiplies pairs of channels; all else is float32.
#pragma once

#include "vec.h"

namespace toca::cpu::TOCA_ISA {
namespace {

constexpr int kKeyVecs = kVec == 16 ? 4 : 2;
constexpr int kKeys = kKeyVecs * kVec;
constexpr int kQueries = 6;  // kQueries * kKeyVecs accumulators fit the register file
constexpr float kLog2e = 1.44269504f;

// float32 arithmetic: one channel at a time.
template <class T>
struct Float {
  using Packed = float;
  static int64_t channels(int64_t D) { return D; }
  static void pack_key(const T* key, int64_t D, int lane, Packed* tile) {
    for (int64_t d = 0; d < D; ++d) tile[d * kKeys + lane] = to_float(key[d]);
  }
  static void pack_query(const T* query, int64_t D, Packed* row) {
    int64_t d = 0;
    for (; d + kVec <= D; d += kVec) store(row + d, load(query + d));
    if (d < D) store_tail(row + d, load_tail(query + d, int(D - d)), int(D - d));
  }
  static Vec multiply_add(Vec sum, Packed query, const Packed* keys) {
    return sum + query * load(keys);
  }
};

template <class T>
struct Arithmetic : Float<T> {};

#if defined(__AVX512BF16__)
// Pairs of channels, multiplied and added in one instruction.
template <>
struct Arithmetic<bf16> {
  using Packed = uint32_t;
  static int64_t channels(int64_t D) { return (D + 1) / 2; }
  static void pack_key(const bf16* key, int64_t D, int lane, Packed* tile) {
    for (int64_t d = 0; d < channels(D); ++d) tile[d * kKeys + lane] = pair(key, D, d);
  }
  static void pack_query(const bf16* query, int64_t D, Packed* row) {
    if (D % 2) row[D / 2] = 0;  // half of the last pair is no channel
    std::memcpy(row, query, D * sizeof(bf16));
  }
  static Vec multiply_add(Vec sum, Packed query, const Packed* keys) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(query)),
                                 (__m512bh)_mm512_loadu_si512(keys));
  }
  static Packed pair(const bf16* row, int64_t D, int64_t d) {
    const uint32_t second = 2 * d + 1 < D ? row[2 * d + 1].bits : 0;
    return second << 16 | row[2 * d].bits;
  }
};
#endif

// dot[i][v] = q_i . k of each of kKeys keys.
template <class A>
void dots(const typename A::Packed* queries, const typename A::Packed* keys, int64_t channels,
          Vec (&dot)[kQueries][kKeyVecs]) {
  for (int64_t d = 0; d < channels; ++d) {
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kKeyVecs; ++v)
        dot[i][v] =
            A::multiply_add(dot[i][v], queries[i * channels + d], keys + d * kKeys + v * kVec);
  }
}

}  // namespace
}  // namespace toca::cpu::TOCA_ISA
