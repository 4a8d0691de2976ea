// Decode of one token in one cooperative launch: GEMV, exchange of the best r outputs over the
// grid, update of the outputs that every block still holds in shared memory (PERFORMANCE.md, design for
// N = 1). Plain selection, component clip or none, first order.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../policy.h"

namespace vps {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kLargestR = 8;
constexpr int kUnroll = 4;  // 16-byte loads of W in flight a lane

struct Decode {
  const void* x;         // [d_in]
  const void* weight;    // [d_out, d_in], rows of unit step
  const void* bias;      // [d_out] or null
  const bool* counted;   // one element, or null where the token counts
  const int64_t* I_in;   // [r] or null to select here
  const int64_t* I_out;  // [r] or null to select here
  const Policy* policy;
  const double* columns;  // factor of each column [r], or null for 1 everywhere
  const double* entropy;  // one element or null
  void* y;               // [d_out]
  int64_t* features;     // [2, r]
  float* core;           // [r, r]
  float* gamma;          // [1]
  void* t;               // [r] or null
  uint64_t* keys;        // scratch [blocks, r]
  float* outputs;        // scratch [blocks, r]
  float* row_squares;    // scratch [blocks, r]
  float* column_squares;  // scratch [blocks, r]
  float* energy;         // scratch [blocks]
  int64_t row_stride;
  int d_in, d_out, rows_per_block, r;
  double inverse_width;  // 1 / d_out
  bool adaptive;
  float tau;    // negative for no clip
  float clamp;  // negative for no clamp
};

/// Shared memory of a block in bytes.
__host__ __device__ inline size_t shared_bytes(int d_in, int rows_per_block, int r) {
  return sizeof(float) * (static_cast<size_t>(d_in) + rows_per_block * (2 + r));
}

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
template <class T>
__device__ T narrow(float v);
template <>
__device__ inline float narrow<float>(float v) { return v; }
template <>
__device__ inline __half narrow<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

__device__ inline float magnitude(float v) { return isfinite(v) ? fabsf(v) : 0.0f; }

/// Sorts like the score, then like the lower index; never 0.
__device__ inline uint64_t key_of(float v, int index) {
  return static_cast<uint64_t>(__float_as_uint(magnitude(v))) << 32 | (0xFFFFFFFFu - index);
}
__device__ inline int index_of(uint64_t key) {
  return static_cast<int>(0xFFFFFFFFu - static_cast<uint32_t>(key));
}

struct Sum {
  template <class V>
  __device__ V operator()(V a, V b) const { return a + b; }
};
struct Max {
  template <class V>
  __device__ V operator()(V a, V b) const { return a > b ? a : b; }
};

/// Of all threads of the block, in one fixed order, for all threads.
template <class V, class Op>
__device__ V reduce(V value, Op op) {
  __shared__ V warps[kWarps];
  for (int lane = 16; lane; lane /= 2) value = op(value, __shfl_xor_sync(~0u, value, lane));
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = warps[0];
  for (int warp = 1; warp < kWarps; ++warp) value = op(value, warps[warp]);
  return value;
}

/// Largest key below `bound` among key(i), i < count.
template <class Key>
__device__ uint64_t best_below(uint64_t bound, int count, Key key) {
  uint64_t best = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const uint64_t k = key(i);
    if (k < bound && k > best) best = k;
  }
  return reduce(best, Max());
}

/// Row of W times x: the product in *dot and the sum of squares in *squares, in every lane.
template <class T>
__device__ void row_product(const T* row, const float* x, int d_in, float* dot, float* squares) {
  constexpr int kVector = 16 / sizeof(T);
  const int lane = threadIdx.x % 32;
  float sum = 0, square = 0;
  const int vectors = reinterpret_cast<uintptr_t>(row) % 16 == 0 ? d_in / kVector : 0;
  for (int v = lane; v < vectors; v += 32 * kUnroll) {
    int4 packed[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (v + 32 * u < vectors)
        packed[u] = __ldcs(reinterpret_cast<const int4*>(row) + v + 32 * u);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (v + 32 * u >= vectors) break;
      const T* w = reinterpret_cast<const T*>(&packed[u]);
      const float* xs = x + (v + 32 * u) * kVector;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float value = widen(w[i]);
        sum = fmaf(value, xs[i], sum);
        square = fmaf(value, value, square);
      }
    }
  }
  for (int i = vectors * kVector + lane; i < d_in; i += 32) {
    const float value = widen(row[i]);
    sum = fmaf(value, x[i], sum);
    square = fmaf(value, value, square);
  }
  for (int other = 16; other; other /= 2) {
    sum += __shfl_xor_sync(~0u, sum, other);
    square += __shfl_xor_sync(~0u, square, other);
  }
  *dot = sum;
  *squares = square;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const Decode p) {
  extern __shared__ float shared[];
  float* const x = shared;                          // [d_in]
  float* const H = x + p.d_in;                      // [rows_per_block]
  float* const squares = H + p.rows_per_block;      // [rows_per_block]
  float* const columns = squares + p.rows_per_block;  // [rows_per_block, r]
  __shared__ int I_in[kLargestR], I_out[kLargestR];
  __shared__ float u[kLargestR], scale[kLargestR], selected[kLargestR], weight_of[kLargestR];
  __shared__ float norm_A[kLargestR], norm_B[kLargestR];
  const int r = p.r, block = blockIdx.x;
  const int first = block * p.rows_per_block;
  const int rows = max(0, min(p.rows_per_block, p.d_out - first));
  const T* const weight = static_cast<const T*>(p.weight) + first * p.row_stride;

  for (int i = threadIdx.x; i < p.d_in; i += kThreads)
    x[i] = widen(static_cast<const T*>(p.x)[i]);
  __syncthreads();
  uint64_t bound = ~0ull;
  for (int c = 0; c < r; ++c) {
    if (!p.I_in) bound = best_below(bound, p.d_in, [&](int i) { return key_of(x[i], i); });
    if (threadIdx.x == 0) I_in[c] = p.I_in ? static_cast<int>(p.I_in[c]) : index_of(bound);
  }
  __syncthreads();

  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < rows; row += kWarps) {
    const T* const source = weight + row * p.row_stride;
    float dot, square;
    row_product(source, x, p.d_in, &dot, &square);
    if (lane == 0) {
      H[row] = widen(narrow<T>(dot));
      squares[row] = square;
    }
    if (lane < r) columns[row * r + lane] = widen(source[I_in[lane]]);
  }
  __syncthreads();

  float energy = 0;
  for (int row = threadIdx.x; row < rows; row += kThreads) {
    const float size = magnitude(H[row]);
    energy += size * size;
  }
  energy = reduce(energy, Sum());
  if (threadIdx.x == 0) p.energy[block] = energy;
  bound = ~0ull;
  for (int c = 0; c < r; ++c) {
    float square = 0;
    for (int row = threadIdx.x; row < rows; row += kThreads)
      square += columns[row * r + c] * columns[row * r + c];
    square = reduce(square, Sum());
    if (!p.I_out)
      bound = best_below(bound, rows, [&](int i) { return key_of(H[i], first + i); });
    if (threadIdx.x == 0) {
      const int64_t at = static_cast<int64_t>(block) * r + c;
      p.column_squares[at] = square;
      p.keys[at] = p.I_out ? 0 : bound;
      const int row = (p.I_out ? static_cast<int>(p.I_out[c]) : index_of(bound)) - first;
      const bool mine = row >= 0 && row < rows && (p.I_out || bound);
      p.outputs[at] = mine ? H[row] : 0.0f;
      p.row_squares[at] = mine ? squares[row] : 0.0f;
    }
  }
  cooperative_groups::this_grid().sync();

  const int blocks = gridDim.x;
  energy = 0;
  for (int i = threadIdx.x; i < blocks; i += kThreads) energy += p.energy[i];
  energy = reduce(energy, Sum());
  bound = ~0ull;
  for (int c = 0; c < r; ++c) {
    float square = 0;
    for (int i = threadIdx.x; i < blocks; i += kThreads)
      square += p.column_squares[static_cast<int64_t>(i) * r + c];
    square = reduce(square, Sum());
    if (!p.I_out) bound = best_below(bound, blocks * r, [&](int i) { return p.keys[i]; });
    const int feature = p.I_out ? static_cast<int>(p.I_out[c]) : index_of(bound);
    const int owner = feature / p.rows_per_block;
    for (int slot = threadIdx.x; slot < r; slot += kThreads) {
      const int64_t at = static_cast<int64_t>(owner) * r + slot;
      if (p.I_out ? slot == c : p.keys[at] == bound) {
        I_out[c] = feature;
        selected[c] = p.outputs[at];
        norm_A[c] = sqrtf(p.row_squares[at]);
        norm_B[c] = sqrtf(square);
      }
    }
  }
  __syncthreads();

  Decision decision{};  // of a token that does not count
  if (!p.counted || *p.counted)
    decision =
        decide(*p.policy, p.entropy, p.adaptive ? energy * p.inverse_width : 0.0, r, false);
  const double gamma = decision.gamma;
  const int active = static_cast<int>(decision.active);
  if (threadIdx.x < r) {
    const int c = threadIdx.x;
    const float s = p.tau < 0 ? 1.0f : norm_A[c] * norm_B[c] / p.tau;
    scale[c] = s <= 1.0f ? 1.0f : s;
    const float factor = p.clamp < 0 ? static_cast<float>(gamma) : 1.0f;
    const float own = p.columns ? static_cast<float>(p.columns[c]) : 1.0f;
    weight_of[c] = c < active ? own / scale[c] : 0.0f;
    u[c] = c < active ? selected[c] * weight_of[c] * factor : 0.0f;
  }
  __syncthreads();

  for (int row = threadIdx.x; row < rows; row += kThreads) {
    float base = H[row];
    if (p.bias) base += widen(static_cast<const T*>(p.bias)[first + row]);
    if (gamma != 0) {
      float delta = 0;
      for (int c = 0; c < active; ++c) delta = fmaf(u[c], columns[row * r + c], delta);
      if (p.clamp >= 0) {
        delta = delta > p.clamp ? p.clamp : delta < -p.clamp ? -p.clamp : delta;
        delta *= static_cast<float>(gamma);
      }
      base += delta;
    }
    static_cast<T*>(p.y)[first + row] = narrow<T>(base);
  }
  if (block == 0 && threadIdx.x < r) {
    const int c = threadIdx.x;
    p.features[c] = I_in[c];
    p.features[r + c] = I_out[c];
    for (int j = 0; j < r; ++j)
      p.core[j * r + c] = j == c ? weight_of[c] : 0.0f;
    if (p.t) static_cast<T*>(p.t)[c] = narrow<T>(c < active ? selected[c] : 0.0f);
    if (c == 0) *p.gamma = static_cast<float>(gamma);
  }
}

}  // namespace vps
