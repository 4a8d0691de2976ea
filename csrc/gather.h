// Columns of W as rows of their own, and the features that several groups share.
#pragma once

#include <cstdint>

#include "workspace.h"

namespace vps {

struct Matrix {  // of elements of one dtype, any strides
  const void* data;
  int64_t rows, width;
  int64_t stride, step;  // in elements, from row to row and within a row
};

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
  parallel((W.rows + kBlock - 1) / kBlock, kMiss * kBlock * wanted.count, [&](int64_t b, int64_t e) {
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
