// How the rows of W are spread over the blocks of decode.cuh, all of which must run at once.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <tuple>

namespace vps {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kLargestR = 8;
constexpr int kRecords = 5;  // of all blocks that a thread takes; so many times kThreads at most

struct Plan {
  int blocks, rows_per_block;
  size_t bytes;  // dynamic shared memory of a block
};

/// Dynamic shared memory of a block in bytes.
__host__ __device__ inline size_t shared_bytes(int d_in, int rows_per_block, int r) {
  return sizeof(float) * (static_cast<size_t>(d_in) + rows_per_block * (3 + r));
}

inline void succeed(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  std::ostringstream message;
  message << "vps::cooperative_decode: " << call << ": " << cudaGetErrorString(status);
  throw std::runtime_error(message.str());
}

inline int attribute(cudaDeviceAttr of, int device) {
  int value;
  succeed(cudaDeviceGetAttribute(&value, of, device), "cudaDeviceGetAttribute");
  return value;
}

/// Makes all of a block's shared memory usable by a kernel on the current device; returns how much
/// of it is dynamic.
inline size_t most_shared(const void* kernel, int device) {
  cudaFuncAttributes of_kernel;
  succeed(cudaFuncGetAttributes(&of_kernel, kernel), "cudaFuncGetAttributes");
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) -
                   static_cast<int>(of_kernel.sharedSizeBytes);
  succeed(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
          "cudaFuncSetAttribute");
  return most;
}

/// The plan for one shape, made once: two blocks a processor, or one where two do not fit or would
/// leave the fullest processor over a ninth more rows. `device` is the current one. The limit of shared memory belongs to the kernel, not to a launch, so it is set
/// once and never lowered: several host threads plan and launch different shapes.
inline Plan plan(const void* kernel, int device, int d_in, int d_out, int r) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int, int>, Plan> plans;
  static std::map<std::pair<const void*, int>, size_t> limits;
  const std::lock_guard lock(mutex);
  const auto known = plans.find({kernel, device, d_in, d_out, r});
  if (known != plans.end()) return known->second;
  auto limit = limits.find({kernel, device});
  if (limit == limits.end())
    limit = limits.insert({{kernel, device}, most_shared(kernel, device)}).first;
  const int processors = attribute(cudaDevAttrMultiProcessorCount, device);
  Plan best{0, 0, 0};
  int fullest = 0;  // rows of one processor
  for (const int together : {2, 1}) {
    const int most = std::min(processors * together, kRecords * kThreads / r);
    const int rows = (d_out + most - 1) / most;
    const Plan found{(d_out + rows - 1) / rows, rows, shared_bytes(d_in, rows, r)};
    if (found.bytes > limit->second || (best.blocks && 10 * rows * together >= 9 * fullest)) continue;
    int resident = 0;
    succeed(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, found.bytes),
            "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    if (static_cast<int64_t>(resident) * processors < found.blocks) continue;
    best = found;
    fullest = rows * together;
  }
  if (best.blocks) return plans[{kernel, device, d_in, d_out, r}] = best;
  throw std::invalid_argument(
      "vps::cooperative_decode: weight must be small enough for x and one block's rows to fit in "
      "shared memory");
}

}  // namespace vps
