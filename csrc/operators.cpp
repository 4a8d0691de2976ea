// vps::linear and vps::linear_only on a CPU, registered for their schemas in vps/backends/operator.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.h"
#include "linear.h"
#include "tensors.h"

namespace vps {
namespace {

/// With `keep` what a gradient needs, else y and I_in alone.
template <bool keep>
auto linear(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& mask,
            const Optional& I_in, const Optional& I_out, const Tensor& policy,
            const Optional& entropy, const Optional& H, const Optional& energy,
            const Rules& rules, const Numbers& numbers) {
  const Arguments arguments{x,      weight,  bias, mask,   I_in,
                            I_out,  policy,  entropy, H, energy, Settings(rules, numbers)};
  if constexpr (keep) {
    return sharpen(arguments, nullptr);
  } else {
    Optional selected;
    const Tensor y = sharpen_only(arguments, nullptr, &selected);
    return std::tuple(y, *selected);
  }
}

}  // namespace
}  // namespace vps

STABLE_TORCH_LIBRARY_IMPL(vps, CPU, m) {
  m.impl("linear", TORCH_BOX(&vps::linear<true>));
  m.impl("linear_only", TORCH_BOX(&vps::linear<false>));
}
