// Scores and energy of groups of tokens, and the base product of few tokens.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../simd/kernels.h"
#include "gather.h"
#include "workspace.h"

namespace vps {

/// The tokens of a call: G groups of T.
struct Tokens {
  int64_t groups, per_group;
  const bool* counted;    // [G, T], or null when all count
  const int64_t* counts;  // [G]

  const bool* of(int64_t group) const { return counted ? counted + group * per_group : nullptr; }
};

inline int64_t* count_tokens(int64_t groups, int64_t tokens, const bool* counted,
                             Workspace& workspace) {
  int64_t* counts = workspace.take<int64_t>(groups);
  for (int64_t g = 0; g < groups; ++g)
    counts[g] = counted ? std::count(counted + g * tokens, counted + (g + 1) * tokens, true)
                        : tokens;
  return counts;
}

/// Scores [n, width] of n groups from group `first` on, of values [G, T, width]; their energy
/// goes to energy[first ...] unless it is null.
inline void group_scores(const Kernels& kernels, const void* values, int64_t element_size,
                         int64_t width, const Tokens& tokens, int64_t first, int64_t n,
                         float* scores, double* energy, Workspace& workspace) {
  const int64_t T = tokens.per_group, tiles = (width + kColumnTile - 1) / kColumnTile;
  double* squares = workspace.take<double>(n * tiles);
  parallel(n * tiles, T * std::min(width, kColumnTile), [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      const int64_t g = first + i / tiles, j = i % tiles * kColumnTile;
      squares[i] = kernels.column_scores(
          static_cast<const std::byte*>(values) + (g * T * width + j) * element_size, T,
          std::min(kColumnTile, width - j), width, tokens.of(g), scores + i / tiles * width + j);
    }
  });
  if (!energy) return;
  for (int64_t i = 0; i < n; ++i) {
    double total = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) total += squares[i * tiles + tile];
    const int64_t count = std::max<int64_t>(1, tokens.counts[first + i]);
    energy[first + i] = total / (static_cast<double>(count) * static_cast<double>(width));
  }
}

/// How many groups to take at once, so that their scores stay cached.
inline int64_t groups_at_once(int64_t groups, int64_t width) {
  return std::min(groups, std::max<int64_t>(1, (1 << 18) / width));
}

/// The r best features of values [G, T, width] to features[g * stride ...] unless that is null,
/// and the energy [G] unless that is null.
inline void select(const Kernels& kernels, const void* values, int64_t element_size, int64_t width,
                   const Tokens& tokens, int64_t r, int64_t* features, int64_t stride,
                   double* energy, Workspace& workspace) {
  const int64_t chunk = groups_at_once(tokens.groups, width);
  float* scores = workspace.take<float>(chunk * width);
  float* best = workspace.take<float>(chunk * r);
  for (int64_t first = 0; first < tokens.groups; first += chunk) {
    const int64_t groups = std::min(chunk, tokens.groups - first);
    group_scores(kernels, values, element_size, width, tokens, first, groups, scores, energy,
                 workspace);
    if (features)
      parallel(groups, width, [&](int64_t i, int64_t end) {
        for (; i < end; ++i)
          kernels.top(scores + i * width, width, r, features + (first + i) * stride, best + i * r);
      });
  }
}

/// Whether our own GEMV computes the base product.
inline bool is_gemv(int64_t tokens, const Matrix& W) {
  return tokens <= kMaxGemvTokens && W.step == 1;
}

/// H [tokens, rows] of x [tokens, width] by our own GEMV, and columns of W on the way.
inline void gemv(const Kernels& kernels, Dtype dtype, const Matrix& W, const void* x_data,
                 int64_t tokens, void* H, const int64_t* picks, int64_t n_picks, void* columns,
                 Workspace& workspace) {
  const float* x = static_cast<const float*>(x_data);
  if (dtype != Dtype::float32) {
    float* wide = workspace.take<float>(tokens * W.width);
    kernels.widen(x_data, tokens * W.width, wide);
    x = wide;
  }
  parallel(W.rows, W.width, [&](int64_t begin, int64_t end) {
    kernels.gemv(W.data, W.stride, W.rows, W.width, begin, end, x, tokens, H, picks, n_picks,
                 columns);
  });
}

}  // namespace vps
