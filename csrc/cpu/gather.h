// Rows and columns of W with unit step, and the features that several groups share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../simd/element.h"
#include "../simd/kernels.h"
#include "../tensors.h"
#include "workspace.h"

namespace vps {

struct Matrix {  // of elements of one dtype, any strides
  const void* data;
  int64_t rows, width;
  int64_t stride, step;  // in elements, from row to row and within a row
};

inline Matrix matrix(const Tensor& W) {
  return {W.data_ptr(), W.size(0), W.size(1), W.stride(0), W.stride(1)};
}

/// out[i] = values[i] in `dtype`, i < count.
inline void narrow(const float* values, int64_t count, Dtype dtype, void* out) {
  if (dtype == Dtype::float32)
    std::copy_n(values, count, static_cast<float*>(out));
  else if (dtype == Dtype::bfloat16)
    std::copy_n(values, count, static_cast<BFloat16*>(out));
  else
    std::copy_n(values, count, static_cast<Half*>(out));
}

/// Row k of W with unit step.
inline const void* row(const Matrix& W, int64_t k, int64_t element_size, Workspace& workspace) {
  const auto* source = static_cast<const std::byte*>(W.data) + k * W.stride * element_size;
  if (W.step == 1) return source;
  auto* copy = workspace.take<std::byte>(W.width * element_size);
  for (int64_t j = 0; j < W.width; ++j)
    std::memcpy(copy + j * element_size, source + j * W.step * element_size, element_size);
  return copy;
}

/// Given features [G, r] to features[g * stride + c].
inline void copy_features(const Tensor& given, int64_t* features, int64_t stride) {
  const int64_t* source = data<int64_t>(given);
  const int64_t step[2] = {given.stride(0), given.stride(1)};
  for (int64_t g = 0; g < given.size(0); ++g)
    for (int64_t c = 0; c < given.size(1); ++c)
      features[g * stride + c] = source[g * step[0] + c * step[1]];
}

/// Distinct features, and which of them each entry of an index [count] is.
struct Distinct {
  const int64_t* features;
  int64_t count;
  const int64_t* slots;
};

inline Distinct distinct(const int64_t* const* index, int64_t groups, int64_t r, int64_t width,
                         Workspace& workspace) {
  int64_t* slots = workspace.take<int64_t>(groups * r);
  if (groups == 1) {
    for (int64_t c = 0; c < r; ++c) slots[c] = c;
    return {index[0], r, slots};
  }
  int64_t* place = workspace.take<int64_t>(width);
  int64_t* features = workspace.take<int64_t>(std::min(width, groups * r));
  std::fill(place, place + width, int64_t{-1});
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t c = 0; c < r; ++c) place[index[g][c]] = 0;
  int64_t count = 0;
  for (int64_t j = 0; j < width; ++j)
    if (place[j] == 0) {
      place[j] = count;
      features[count++] = j;
    }
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t c = 0; c < r; ++c) slots[g * r + c] = place[index[g][c]];
  return {features, count, slots};
}

/// columns[c * rows + k] = W[k, features[c]], in blocks of rows that stay cached.
template <class Bits>
void gather_columns(const Matrix& W, const Distinct& wanted, void* columns_) {
  constexpr int64_t kBlock = 64;
  constexpr int64_t kMiss = 32;  // what an element from memory costs in elements from a cache
  const Bits* data = static_cast<const Bits*>(W.data);
  Bits* columns = static_cast<Bits*>(columns_);
  const int64_t blocks = (W.rows + kBlock - 1) / kBlock;
  parallel(blocks, kMiss * kBlock * wanted.count, [&](int64_t b, int64_t e) {
    for (; b < e; ++b) {
      const int64_t end = std::min(W.rows, (b + 1) * kBlock);
      for (int64_t c = 0; c < wanted.count; ++c) {
        const Bits* source = data + wanted.features[c] * W.step;
        for (int64_t k = b * kBlock; k < end; ++k) columns[c * W.rows + k] = source[k * W.stride];
      }
    }
  });
}

}  // namespace vps
