// The loops for x86-64 processors with avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "element.h"
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include "simd_avx512.h"
#define VPS_VARIANT avx512
#include "variant.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
