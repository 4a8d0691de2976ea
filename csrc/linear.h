// One sharpened layer, for who has part of its work done.
#pragma once

#include <tuple>

#include "arguments.h"
#include "tensors.h"

namespace vps {

/// A base product to be overwritten with y, and the columns of W that are in use, if they are known.
struct Product {
  Tensor H;             // [G, T, d_out], contiguous
  const void* columns;  // of the distinct features of I_in (gather.h), or null
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

/// y, features [G, 2, r], core [G, r, r], gamma [G] and t: see vps/backends/operator.py. `product` may be null.
Results sharpen(const Arguments& arguments, const Product* product);

/// y alone, for who needs no gradient; I_in [G, r] goes to `I_in` unless that is null.
Tensor sharpen_only(const Arguments& arguments, const Product* product, Optional* I_in);

}  // namespace vps
