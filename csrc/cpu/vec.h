// One vector type and four load/store verbs for all dtypes and instruction sets.
//
// Built on the compiler's vector extension, so the same kernel source is compiled once per
// instruction set (TOCA_ISA names the namespace) and lowered to SSE2, NEON, AVX2 or AVX-512.
// Only conversions that the extension cannot express use intrinsics.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace toca::cpu::TOCA_ISA {

#if defined(__AVX512F__)
constexpr int kVec = 16;
#elif defined(__AVX2__)
constexpr int kVec = 8;
#else
constexpr int kVec = 4;
#endif

typedef float Vec __attribute__((vector_size(kVec * 4)));
typedef int32_t VecI __attribute__((vector_size(kVec * 4)));
typedef uint32_t VecU __attribute__((vector_size(kVec * 4)));
typedef uint16_t VecH __attribute__((vector_size(kVec * 2)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as needs types of one size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Scratch of a thread.  Not std::vector: a library template compiled for one instruction set would
// be merged with the others' by the linker, and run where the CPU lacks it.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(new T[size > 0 ? size : 1]), size_(size) {}
  ~Buffer() { delete[] data_; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  void fill(T value) {
    for (int64_t i = 0; i < size_; ++i) data_[i] = value;
  }

 private:
  T* data_;
  int64_t size_;
};

inline Vec splat(float value) { return Vec{} + value; }

// --- load: kVec values of any dtype as float32 ---

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Vec load(const bf16* p) {
  VecH h;
  std::memcpy(&h, p, sizeof(h));
  return bits_as<Vec>(__builtin_convertvector(h, VecU) << 16);
}

#if !defined(__F16C__)
inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return bits_as<float>(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  // A power-of-two product also normalises the subnormals.
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(rest << 13) * 0x1p112f));
}

inline uint16_t float_to_half(float f) {
  const uint32_t u = bits_as<uint32_t>(f), sign = u >> 16 & 0x8000;
  const float magnitude = std::fabs(f);
  if (!(magnitude == magnitude)) return sign | 0x7e00;
  if (magnitude >= 65520.f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f)  // subnormal: adding 2^-1 * 2^-13 leaves the rounded bits at the end
    return sign | (bits_as<uint32_t>(magnitude + 0.5f) - bits_as<uint32_t>(0.5f));
  const uint32_t m = bits_as<uint32_t>(magnitude) - (112u << 23);
  return sign | (m + 0xfff + (m >> 13 & 1)) >> 13;
}
#endif

inline Vec load(const f16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec v;
  for (int i = 0; i < kVec; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}

// --- one value as float32: for loops that cannot load a vector ---

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return bits_as<float>(uint32_t(value.bits) << 16); }
inline float to_float(f16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  return half_to_float(value.bits);
#endif
}

// --- store: float32 rounded to nearest even, NaN stays NaN; subnormal bfloat16 may become 0 ---

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

inline void store(bf16* p, Vec v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);  // takes subnormals for zero
  std::memcpy(p, &h, sizeof(h));
#else
  const VecU u = bits_as<VecU>(v);
  const VecU rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  const VecU nan = VecU(v != v);
  const VecH h = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), VecH);
  std::memcpy(p, &h, sizeof(h));
#endif
}

inline void store(f16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kVec; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// --- the last n < kVec values of a row; the lanes beyond are zero and are not written ---

template <class T>
inline Vec load_tail(const T* p, int n) {
  T buffer[kVec] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store_tail(T* p, Vec v, int n) {
  T buffer[kVec];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

inline float sum(Vec v) {
  // Halving adds keep the order fixed for each width.
  for (int width = kVec / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}

// Calls body(offset, load, store) for every vector of a row of C values: `load(p)` reads
// p[offset...], `store(p, v)` writes there, and the tail is handled here once.
template <class Body>
inline void for_row(int64_t C, Body body) {
  int64_t c = 0;
  for (; c + kVec <= C; c += kVec)
    body(c, [c](auto* p) { return load(p + c); }, [c](auto* p, Vec v) { store(p + c, v); });
  if (c < C) {
    const int n = int(C - c);
    body(
        c, [c, n](auto* p) { return load_tail(p + c, n); },
        [c, n](auto* p, Vec v) { store_tail(p + c, v, n); });
  }
}

inline Vec exp2_fraction(Vec f) {  // 2^f for f in [-0.5, 0.5]
  Vec p = splat(1.5353362e-4f);
  p = p * f + 1.3398874e-3f;
  p = p * f + 9.6184373e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022649e-1f;
  p = p * f + 6.9314720e-1f;
  return p * f + 1.f;
}

// 2^x to 2 units in the last place for -126 <= x < 127.5; 0 from -127 down, infinity from 128 up;
// NaN stays NaN.
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
  // The second operand of max and min passes where one is NaN.
  const __m512 low = _mm512_set1_ps(-127.f), high = _mm512_set1_ps(128.f);
  const __m512 y = _mm512_min_ps(high, _mm512_max_ps(low, (__m512)x));
  const __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec p = (Vec)_mm512_scalef_ps((__m512)exp2_fraction((Vec)_mm512_sub_ps(y, whole)), whole);
  const __mmask16 keep = _mm512_cmp_ps_mask(y, low, _CMP_NLE_UQ);
  return (Vec)_mm512_maskz_mov_ps(keep, (__m512)p);
#else
  const Vec low = splat(-127.f), high = splat(128.f), magic = splat(12582912.f);  // 1.5 * 2^23
  x = x < low ? low : x;  // a comparison with NaN is false: NaN passes through
  x = x > high ? high : x;
  const Vec shifted = x + magic;  // the integer part, rounded, in the low bits
  const VecU exponent = (bits_as<VecU>(shifted) - bits_as<VecU>(magic) + 127u) << 23;
  // Exponent bits 0 (2^-127) make the product 0, exponent bits 255 (2^128) infinity.
  return exp2_fraction(x - (shifted - magic)) * bits_as<Vec>(exponent);
#endif
}

}  // namespace toca::cpu::TOCA_ISA
