// 16-bit elements as torch stores them; they convert to and from float, rounded to nearest even.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace vps {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

}  // namespace vps
