// One sharpened layer, optionally from a product that is known.
#pragma once

#include <tuple>

#include "arguments.h"

namespace vps {

/// A base product to be overwritten with y, and the columns of W in use, if they are known.
struct Product {
  Tensor H;             // [G, T, d_out], contiguous
  const void* columns;  // of the distinct features of I_in (gather.h), or null
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

/// y, features [G, 2, r], core [G, r, r], gamma [G] and t, all that a gradient needs.
Results sharpen(const Arguments& arguments);

/// y, features [G, 2, r], core [G, r, r], gamma [G] and E = gamma Cᵀ W[I_out] [G, r, d_in]: what a
/// prompt decides (SPEC §11). `product` may be null.
Results hold(const Arguments& arguments, const Product* product);

/// y alone; I_in [G, r] goes to `I_in` unless that is null. `product` may be null.
Tensor sharpen_only(const Arguments& arguments, const Product* product, Optional* I_in);

}  // namespace vps
