// The gradient of one sharpened layer in its input.
#pragma once

#include "arguments.h"

namespace vps {

/// ∂L/∂x [G, T, d_in].
Tensor backward(const BackwardArguments& arguments);

}  // namespace vps
