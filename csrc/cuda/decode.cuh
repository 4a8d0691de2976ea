// Decode of one token in one cooperative launch: GEMV, exchange of the best r outputs over the
// grid, update of the outputs that every block still holds in shared memory. Plain selection,
// component clip or none, first order. Maxima are found by warps, so few barriers of the block are
// needed; all constants of the layer are read before the barrier of the grid.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../policy.h"
#include "plan.h"

namespace vps {

constexpr int kUnroll = 4;  // 16-byte loads of W in flight a lane

/// Sorts like the score, then like the lower index; nothing is {0, 0}.
struct Candidate {
  uint32_t score, index;  // bits of a magnitude; 2^32 - 1 less the index
};

/// One of the best r outputs of a block.
struct alignas(16) Record {
  Candidate candidate;
  float output, squares;  // H[index], and the sum of squares of its row of W
};

struct Decode {
  const void* x;         // [d_in]
  const void* weight;    // [d_out, d_in], rows of unit step
  const void* bias;      // [d_out] or null
  const bool* counted;   // one element, or null where the token counts
  const int64_t* I_in;   // [r] or null to select here
  const int64_t* I_out;  // [r] or null to select here
  const Policy* policy;
  const double* columns;  // factor of each column [r], or null for 1 everywhere
  const double* entropy;  // nats or -1, and the factor of the history; or null
  void* y;               // [d_out]
  int64_t* features;     // [2, r]
  float* core;           // [r, r]
  float* gamma;          // [1]
  void* t;               // [r] or null
  Record* records;       // scratch [blocks, r]
  float* sums;           // scratch [1 + r, blocks]: energy, squares of the columns I_in of W
  int64_t row_stride;
  int d_in, d_out, rows_per_block, r;
  double inverse_width;  // 1 / d_out
  bool adaptive;
  float tau;    // negative for no clip
  float clamp;  // negative for no clamp
};

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

__device__ inline Candidate candidate(float v, int index) {
  return {__float_as_uint(magnitude(v)), 0xFFFFFFFFu - index};
}
__device__ inline int index_of(Candidate c) { return static_cast<int>(0xFFFFFFFFu - c.index); }
__device__ inline bool above(Candidate a, Candidate b) {
  return a.score > b.score || (a.score == b.score && a.index > b.index);
}

/// The best of the lanes of a warp, in every lane.
__device__ inline Candidate best_of_warp(Candidate mine) {
  const uint32_t score = __reduce_max_sync(~0u, mine.score);
  return {score, __reduce_max_sync(~0u, mine.score == score ? mine.index : 0u)};
}

/// The best below `bound` of at(i), i = start, start + step ... below count, over a warp.
template <class At>
__device__ Candidate best_below(Candidate bound, int start, int step, int count, At at) {
  Candidate best{0, 0};
  for (int i = start; i < count; i += step) {
    const Candidate c = at(i);
    if (above(bound, c) && above(c, best)) best = c;
  }
  return best_of_warp(best);
}

/// The best of the K candidates of each lane of a warp, which is struck out, in every lane. The
/// lane that held it gets its k in *at.
template <int K>
__device__ Candidate take(Candidate (&mine)[K], int* at = nullptr) {
  Candidate best = mine[0];
#pragma unroll
  for (int k = 1; k < K; ++k)
    if (above(mine[k], best)) best = mine[k];
  best = best_of_warp(best);
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (mine[k].index == best.index) {
      mine[k] = {0, 0};
      if (at) *at = k;
    }
  return best;
}

/// Over a warp in one fixed order, in every lane.
__device__ inline float sum_of_warp(float value) {
  for (int other = 16; other; other /= 2) value += __shfl_xor_sync(~0u, value, other);
  return value;
}

/// What another block wrote before the barrier of the grid.
__device__ inline Record fetch(const Record* record) {
  const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(record));
  return {{bits.x, bits.y}, __uint_as_float(bits.z), __uint_as_float(bits.w)};
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
  *dot = sum_of_warp(sum);
  *squares = sum_of_warp(square);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(const Decode p) {
  extern __shared__ float shared[];
  float* const x = shared;                         // [d_in]
  float* const H = x + p.d_in;                     // [rows_per_block]
  float* const squares = H + p.rows_per_block;     // [rows_per_block]
  float* const bias = squares + p.rows_per_block;  // [rows_per_block]
  float* const columns = bias + p.rows_per_block;  // [rows_per_block, r]
  __shared__ Record survivors[kWarps * kLargestR];
  __shared__ Policy policy;
  __shared__ double nats;
  __shared__ float sums[1 + kLargestR], own[kLargestR];
  __shared__ bool counts;
  constexpr int kSurvivors = (kWarps * kLargestR + 31) / 32;  // a lane
  const int r = p.r, block = blockIdx.x, blocks = gridDim.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = block * p.rows_per_block;
  const int rows = max(0, min(p.rows_per_block, p.d_out - first));
  const T* const weight = static_cast<const T*>(p.weight) + first * p.row_stride;

  for (int i = threadIdx.x; i < p.d_in; i += kThreads)
    x[i] = widen(static_cast<const T*>(p.x)[i]);
  for (int row = threadIdx.x; row < rows; row += kThreads)
    bias[row] = p.bias ? widen(static_cast<const T*>(p.bias)[first + row]) : 0.0f;
  if (threadIdx.x < r)
    own[threadIdx.x] = p.columns ? static_cast<float>(p.columns[threadIdx.x]) : 1.0f;
  if (threadIdx.x == 32) {
    policy = *p.policy;
    if (p.entropy) policy.factor *= p.entropy[1];
    nats = p.entropy ? p.entropy[0] : -1.0;
    counts = !p.counted || *p.counted;
  }
  __syncthreads();

  int I_in = lane < r && p.I_in ? static_cast<int>(p.I_in[lane]) : 0;  // of column `lane`
  int I_out = lane < r && p.I_out ? static_cast<int>(p.I_out[lane]) : 0;
  if (!p.I_in) {  // of the best r of each warp
    Candidate bound{~0u, ~0u};
    for (int c = 0; c < r; ++c) {
      bound = best_below(bound, threadIdx.x, kThreads, p.d_in,
                         [&](int i) { return candidate(x[i], i); });
      if (lane == 0) survivors[warp * r + c].candidate = bound;
    }
    __syncthreads();
    Candidate mine[kSurvivors];
#pragma unroll
    for (int k = 0; k < kSurvivors; ++k) {
      const int at = lane + 32 * k;
      mine[k] = at < kWarps * r ? survivors[at].candidate : Candidate{0, 0};
    }
    for (int c = 0; c < r; ++c) {
      const Candidate best = take(mine);
      if (lane == c) I_in = index_of(best);
    }
  }

  for (int row = warp; row < rows; row += kWarps) {
    const T* const source = weight + row * p.row_stride;
    const float column = lane < r ? widen(source[I_in]) : 0.0f;
    float dot, square;
    row_product(source, x, p.d_in, &dot, &square);
    if (lane == 0) {
      H[row] = widen(narrow<T>(dot));
      squares[row] = square;
    }
    if (lane < r) columns[row * r + lane] = column;
  }
  __syncthreads();

  for (int c = warp - 1; c < r; c += kWarps) {  // a sum a warp
    float sum = 0;
    for (int row = lane; row < rows; row += 32) {
      const float value = c < 0 ? magnitude(H[row]) : columns[row * r + c];
      sum += value * value;
    }
    sum = sum_of_warp(sum);
    if (lane == 0) p.sums[static_cast<int64_t>(1 + c) * blocks + block] = sum;
  }
  if (warp == kWarps - 1) {
    Record* const records = p.records + static_cast<int64_t>(block) * r;
    Candidate bound{~0u, ~0u}, chosen{0, 0};
    int row = I_out - first;
    for (int c = 0; c < r && !p.I_out; ++c) {
      bound = best_below(bound, lane, 32, rows,
                         [&](int i) { return candidate(H[i], first + i); });
      if (lane == c) chosen = bound, row = index_of(bound) - first;
    }
    const bool mine = row >= 0 && row < rows && (p.I_out || chosen.index);
    if (lane < r) records[lane] = {chosen, mine ? H[row] : 0.0f, mine ? squares[row] : 0.0f};
  }
  cooperative_groups::this_grid().sync();

  for (int c = warp - 1; c < r; c += kWarps) {
    float sum = 0;
    for (int i = lane; i < blocks; i += 32)
      sum += __ldcg(p.sums + static_cast<int64_t>(1 + c) * blocks + i);
    sum = sum_of_warp(sum);
    if (lane == 0) sums[1 + c] = sum;
  }
  float output = 0, square = 0;  // of the output of column `lane`
  if (p.I_out) {
    if (lane < r) {
      const Record found = fetch(p.records + static_cast<int64_t>(I_out / p.rows_per_block) * r + lane);
      output = found.output, square = found.squares;
    }
    __syncthreads();
  } else {
    Record found[kRecords];
    Candidate mine[kRecords];
#pragma unroll
    for (int k = 0; k < kRecords; ++k) {
      const int at = threadIdx.x + k * kThreads;
      found[k] = at < blocks * r ? fetch(p.records + at) : Record{};
      mine[k] = found[k].candidate;
    }
    for (int c = 0; c < r; ++c) {
      const Candidate best = take(mine);
      if (!best.index && lane == 0) survivors[warp * r + c] = {};
#pragma unroll
      for (int k = 0; k < kRecords; ++k)
        if (best.index && found[k].candidate.index == best.index)
          survivors[warp * r + c] = found[k];
    }
    __syncthreads();
    Candidate last[kSurvivors];
#pragma unroll
    for (int k = 0; k < kSurvivors; ++k) {
      const int at = lane + 32 * k;
      last[k] = at < kWarps * r ? survivors[at].candidate : Candidate{0, 0};
    }
    for (int c = 0; c < r; ++c) {
      int at = -1;
      const Candidate best = take(last, &at);
      const uint32_t slot = __reduce_max_sync(~0u, at < 0 ? 0u : 1u + lane + 32 * at);
      if (lane == c && slot) {
        I_out = index_of(best);
        output = survivors[slot - 1].output, square = survivors[slot - 1].squares;
      }
    }
  }

  Decision decision{};  // of a token that does not count
  if (counts)
    decision = decide(policy, nats < 0 ? nullptr : &nats,
                      p.adaptive ? sums[0] * p.inverse_width : 0.0, r, false);
  const double gamma = decision.gamma;
  const int active = static_cast<int>(decision.active);
  float weight_of = 0, mine = 0;
  if (lane < active) {
    const float s = p.tau < 0 ? 1.0f : sqrtf(square) * sqrtf(sums[1 + lane]) / p.tau;
    weight_of = own[lane] / (s <= 1.0f ? 1.0f : s);
    mine = output * weight_of * (p.clamp < 0 ? static_cast<float>(gamma) : 1.0f);
  }
  float u[kLargestR];
#pragma unroll
  for (int c = 0; c < kLargestR; ++c) u[c] = __shfl_sync(~0u, mine, c);
  for (int row = threadIdx.x; row < rows; row += kThreads) {
    float base = H[row];
    if (p.bias) base += bias[row];
    if (gamma != 0) {
      float delta = 0;
#pragma unroll
      for (int c = 0; c < kLargestR; ++c)
        if (c < active) delta = fmaf(u[c], columns[row * r + c], delta);
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
    p.features[c] = I_in;
    p.features[r + c] = I_out;
    for (int j = 0; j < r; ++j) p.core[j * r + c] = j == c ? weight_of : 0.0f;
    if (p.t) static_cast<T*>(p.t)[c] = narrow<T>(c < active ? output : 0.0f);
    if (c == 0) *p.gamma = static_cast<float>(gamma);
  }
}

}  // namespace vps
