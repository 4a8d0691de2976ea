// The loops for x86-64 processors with avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "element.h"
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace vps::avx512 {

struct Vec {
  static constexpr int64_t width = 16;
  static constexpr int registers = 32;
  __m512 v;
};

inline Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }

inline Vec load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}

inline Vec load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v.v); }

/// Rounds to nearest even. A NaN that comes from arithmetic is quiet, so its upper half is one too.
inline void store(BFloat16* p, Vec v) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15,
                                                      17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i bits = _mm512_castps_si512(v.v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 number = _mm512_cmp_ps_mask(v.v, v.v, _CMP_ORD_Q);
  const __m512i half =
      _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7fff), odd, _mm512_set1_epi32(0x8000));
  const __m512i rounded = _mm512_mask_add_epi32(bits, number, bits, half);
  const __m512i upper = _mm512_permutexvar_epi16(_mm512_load_si512(kUpper), rounded);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(upper));
}

inline void store(Half* p, Vec v) {
  const __m256i bits = _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}

inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }

inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

/// Adds |v| and v² where v is finite.
inline void add_magnitude(Vec v, Vec& total, Vec& squares) {
  const __m512 size = _mm512_abs_ps(v.v);
  const __mmask16 finite = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0x1.fffffep127f), _CMP_LE_OQ);
  total.v = _mm512_mask_add_ps(total.v, finite, total.v, size);
  squares.v = _mm512_mask3_fmadd_ps(size, size, squares.v, finite);
}

/// v within [-limit, limit]; NaN stays NaN: min and max return their second operand then.
inline Vec clamp(Vec v, Vec limit) {
  const __m512 low = _mm512_xor_ps(limit.v, _mm512_set1_ps(-0.0f));
  return {_mm512_min_ps(limit.v, _mm512_max_ps(low, v.v))};
}

inline bool any_greater(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0;
}

inline float sum(Vec v) { return _mm512_reduce_add_ps(v.v); }

}  // namespace vps::avx512

#define VPS_VARIANT avx512
#include "variant.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
