// Just enough of CUDA to run csrc/cuda/decode.cuh on a CPU: a thread for each thread, a process for
// each block, so that static variables are what __shared__ ones are on a GPU.
#pragma once

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static

using std::isfinite;
using std::max;
using std::min;

struct Dim {
  unsigned x;
};
inline thread_local Dim threadIdx;
inline Dim blockIdx, gridDim;
struct int4 {
  int x, y, z, w;
};

inline constexpr int kEmulatedThreads = 64;
inline float* emulated_shared;
inline std::barrier<> block_barrier(kEmulatedThreads);
inline std::barrier<>* warp_barriers[kEmulatedThreads / 32];
inline uint64_t lanes[kEmulatedThreads];
inline pthread_barrier_t* grid_barrier;

inline void __syncthreads() { block_barrier.arrive_and_wait(); }

template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  const int thread = threadIdx.x;
  std::memcpy(&lanes[thread], &value, sizeof(V));
  warp_barriers[thread / 32]->arrive_and_wait();
  std::memcpy(&value, &lanes[thread ^ mask], sizeof(V));
  warp_barriers[thread / 32]->arrive_and_wait();
  return value;
}

inline int4 __ldcs(const int4* address) { return *address; }
inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

using __half = _Float16;
inline float __half2float(__half v) { return static_cast<float>(v); }
inline __half __float2half_rn(float v) { return static_cast<__half>(v); }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t wide = static_cast<uint32_t>(v.bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t bits = __float_as_uint(v);
  if (std::isnan(v)) return {static_cast<uint16_t>(bits >> 16 | 64)};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

namespace cooperative_groups {
struct Grid {
  void sync() { pthread_barrier_wait(grid_barrier); }
};
inline Grid this_grid() { return {}; }
}  // namespace cooperative_groups
