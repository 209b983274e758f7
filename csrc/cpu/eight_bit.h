// Rows of a cache: of the features' dtype, or in 8 bits with one float32 scale for each row.
//
// The rounding is the same to the bit in every body: the largest magnitude is found among the bits,
// where NaN ranks above infinity; scale and inverse are one product and one division.
#pragma once

#include "../toca.h"
#include "vec.h"

namespace toca::cpu::TOCA_ISA {

struct i8 {
  int8_t bits;
};
struct f8 {  // e4m3fn: no infinity, NaN is 0x7f, the largest value 448
  uint8_t bits;
};

template <class Q>
constexpr float kUnit = 1.f;  // scale of a row whose largest magnitude is 1
template <>
constexpr float kUnit<i8> = 1.f / 127.f;
template <>
constexpr float kUnit<f8> = 1.f / 448.f;

// --- kVec bytes as integers and back; the compiler's own conversion between these widths is slow
// ---

inline VecI widen(const int8_t* p) {
#if defined(__AVX512F__)
  return (VecI)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (VecI)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#elif defined(__x86_64__)
  int32_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  const __m128i v = _mm_cvtsi32_si128(bytes), words = _mm_unpacklo_epi8(v, v);
  return (VecI)_mm_srai_epi32(_mm_unpacklo_epi16(words, words), 24);
#else
  typedef int8_t Bytes __attribute__((vector_size(kVec)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, VecI);
#endif
}

inline void narrow(void* p, VecI v) {  // the low byte of each
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
  const __m256i low = (__m256i)(v & 0xff);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
#elif defined(__x86_64__)
  const __m128i low = (__m128i)(v & 0xff), words = _mm_packs_epi32(low, low);
  const int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
  std::memcpy(p, &bytes, sizeof(bytes));
#else
  typedef int8_t Bytes __attribute__((vector_size(kVec)));
  const Bytes bytes = __builtin_convertvector(v, Bytes);
  std::memcpy(p, &bytes, sizeof(bytes));
#endif
}

inline VecI round_to_int(Vec v) {  // ties to even
#if defined(__AVX512F__)
  return (VecI)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
  return (VecI)_mm256_cvtps_epi32((__m256)v);
#elif defined(__x86_64__)
  return (VecI)_mm_cvtps_epi32((__m128)v);
#else
  VecI rounded;
  for (int i = 0; i < kVec; ++i) rounded[i] = int32_t(std::lrint(v[i]));
  return rounded;
#endif
}

// --- load and store, as vec.h has them for the features' dtypes ---

inline Vec load(const i8* p) { return __builtin_convertvector(widen(&p->bits), Vec); }

inline Vec load(const f8* p) {
#if defined(__F16C__)
  // Bits moved into those of a float16 are the value / 256, subnormals too.
#if defined(__AVX512F__)
  const VecH u = (VecH)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
  const VecH u = (VecH)_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p));
#endif
  const VecH rest = u & 0x7f, nan = VecH(rest == 0x7f) & 0x7c00;
  const VecH half = rest << 7 | nan | (u & 0x80) << 8;
  return load((const f16*)&half) * 256.f;
#else
  const VecU u = bits_as<VecU>(widen((const int8_t*)p)), rest = u & 0x7f;
  const VecU normal = (rest << 20) + (120u << 23);
  // Not by a product with 2^120: float32 subnormals are slow, and may be flushed.
  const VecU small = bits_as<VecU>(2.f * bits_as<Vec>(normal) - 0x1p-6f);
  const VecU magnitude = rest < 8 ? small : normal;
  return bits_as<Vec>((rest == 0x7f ? VecU{} + 0x7fc00000u : magnitude) | (u & 0x80) << 24);
#endif
}

inline void store(i8* p, Vec v) { narrow(p, round_to_int(v)); }  // |v| < 127.5

inline void store(f8* p, Vec v) {  // |v| < 464
  const VecU u = bits_as<VecU>(v), magnitude = u & 0x7fffffff;
  const VecU normal = (magnitude + 0x7ffff + (magnitude >> 20 & 1) - (120u << 23)) >> 20;
  const VecU small = bits_as<VecU>(round_to_int(bits_as<Vec>(magnitude) * 512.f));
  const VecU rounded = (magnitude < (121u << 23) ? small : normal) | (u >> 24 & 0x80);
  narrow(p, bits_as<VecI>(rounded));
}

// Bits of the largest magnitude of a row; above 0x7f800000 where there is a NaN.
template <class T>
inline uint32_t largest_magnitude(const T* row, int64_t C) {
  VecU most = {};
  for_row(C, [&](int64_t, auto load, auto) {
    const VecU magnitude = bits_as<VecU>(load(row)) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  });
  uint32_t largest = 0;
  for (int i = 0; i < kVec; ++i) largest = most[i] > largest ? most[i] : largest;
  return largest;
}

// Writes a row in 8 bits and returns its scale: 0 where it would be subnormal, NaN where the row is
// not finite; the values are 0 then.
template <class Q, class T>
inline float store_row(const T* row, Q* values, int64_t C) {
  const uint32_t largest = largest_magnitude(row, C);
  const bool finite = largest < 0x7f800000;
  const float scale = finite ? bits_as<float>(largest) * kUnit<Q> : 0.f;
  if (scale < 0x1p-126f) {
    std::memset(values, 0, C);
    return finite ? 0.f : bits_as<float>(0x7fc00000u);
  }
  const float inverse = 1.f / scale;
  for_row(C, [&](int64_t, auto load, auto put) { put(values, load(row) * inverse); });
  return scale;
}

// A row to read: values * scale.  The multiply is left out where the values are the features'.
template <class S>
struct Row {
  const S* values;
  float scale;

  template <class Load>
  Vec operator()(Load load) const {
    if constexpr (sizeof(S) == 1) return load(values) * scale;
    return load(values);
  }
};

// Calls body with that row of a cache: a Row<T> where the cache has no scales.
template <class T, class Body>
inline void with_row(const void* cache, const float* scale, DType dtype, int64_t row, int64_t C,
                     Body body) {
  if (!scale)
    body(Row<T>{(const T*)cache + row * C, 1.f});
  else if (dtype == DType::kInt8)
    body(Row<i8>{(const i8*)cache + row * C, scale[row]});
  else
    body(Row<f8>{(const f8*)cache + row * C, scale[row]});
}

}  // namespace toca::cpu::TOCA_ISA
