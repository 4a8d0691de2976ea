// The loops for x86-64 processors with avx2,fma,f16c.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "element.h"
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace vps::avx2 {

struct Vec {
  static constexpr int64_t width = 8;
  static constexpr int registers = 16;
  __m256 v;
};

inline Vec broadcast(float value) { return {_mm256_set1_ps(value)}; }

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }

inline Vec load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}

inline Vec load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v.v); }

inline void store(BFloat16* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v.v, v.v, _CMP_UNORD_Q));
  const __m256i out = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(out), _mm256_extracti128_si256(out, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}

inline void store(Half* p, Vec v) {
  const __m128i bits = _mm256_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
}

inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }

inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

/// Adds |v| and v² where v is finite.
inline void add_magnitude(Vec v, Vec& total, Vec& squares) {
  const __m256 all = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v.v);
  const __m256 finite = _mm256_cmp_ps(all, _mm256_set1_ps(0x1.fffffep127f), _CMP_LE_OQ);
  const __m256 size = _mm256_and_ps(all, finite);
  total.v = _mm256_add_ps(total.v, size);
  squares.v = _mm256_fmadd_ps(size, size, squares.v);
}

/// v within [-limit, limit]; NaN stays NaN: min and max return their second operand then.
inline Vec clamp(Vec v, Vec limit) {
  const __m256 low = _mm256_xor_ps(limit.v, _mm256_set1_ps(-0.0f));
  return {_mm256_min_ps(limit.v, _mm256_max_ps(low, v.v))};
}

inline bool any_greater(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0;
}

inline float sum(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v.v), _mm256_extractf128_ps(v.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

}  // namespace vps::avx2

#define VPS_VARIANT avx2
#include "variant.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
