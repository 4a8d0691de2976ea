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
struct uint4 {
  uint32_t x, y, z, w;
};

inline constexpr int kEmulatedThreads = 64;
inline float* emulated_shared;
inline std::barrier<> block_barrier(kEmulatedThreads);
inline std::barrier<>* warp_barriers[kEmulatedThreads / 32];
inline uint64_t lanes[kEmulatedThreads];
inline pthread_barrier_t* grid_barrier;

inline void __syncthreads() { block_barrier.arrive_and_wait(); }

/// Calls read(other) to get the value of any lane of the warp.
template <class V, class Read>
V exchanged(V value, Read read) {
  const int thread = threadIdx.x, warp = thread / 32;
  std::memcpy(&lanes[thread], &value, sizeof(V));
  warp_barriers[warp]->arrive_and_wait();
  value = read([warp](int lane) {
    V other;
    std::memcpy(&other, &lanes[32 * warp + lane], sizeof(V));
    return other;
  });
  warp_barriers[warp]->arrive_and_wait();
  return value;
}

template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  return exchanged(value, [mask](auto of) { return of(threadIdx.x % 32 ^ mask); });
}
template <class V>
V __shfl_sync(unsigned, V value, int lane) {
  return exchanged(value, [lane](auto of) { return of(lane); });
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  return exchanged(value, [](auto of) {
    uint32_t most = 0;
    for (int lane = 0; lane < 32; ++lane) most = max(most, of(lane));
    return most;
  });
}

inline int4 __ldcs(const int4* address) { return *address; }
template <class V>
V __ldcg(const V* address) {
  return *address;
}
inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
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

// What plan.h asks of an H100, with the registers of a kernel as its address.
using cudaError_t = int;
using cudaDeviceAttr = int;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1;
constexpr int cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
constexpr int kSharedOfProcessor = 228 * 1024, kSharedOfBlock = 227 * 1024, kStaticShared = 2192;
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
inline int dynamic_limit = 48 * 1024;  // of every kernel

inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr of, int) {
  *value = of == cudaDevAttrMultiProcessorCount ? 132 : kSharedOfBlock;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  found->sharedSizeBytes = kStaticShared;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, int, int bytes) {
  if (bytes + kStaticShared > kSharedOfBlock) return cudaErrorInvalidValue;
  dynamic_limit = bytes;
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                                 int threads, size_t bytes) {
  if (static_cast<int>(bytes) > dynamic_limit) return cudaErrorInvalidValue;
  const int registers = (reinterpret_cast<uintptr_t>(kernel) + 7) / 8 * 8;
  const int by_shared = kSharedOfProcessor / static_cast<int>(bytes + kStaticShared + 1024);
  *blocks = std::min({65536 / (registers * threads), by_shared, 2048 / threads});
  return cudaSuccess;
}

namespace cooperative_groups {
struct Grid {
  void sync() { pthread_barrier_wait(grid_barrier); }
};
inline Grid this_grid() { return {}; }
}  // namespace cooperative_groups
