// vps::linear and vps::linear_only on a CPU, registered for their schemas in vps/backends/operator.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.h"
#include "linear.h"
#include "tensors.h"

namespace vps {
namespace {

Results linear(
    const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& mask,
    const Optional& I_in, const Optional& I_out, const Tensor& policy, const Optional& entropy,
    const Optional& H, const Optional& energy, int64_t r, bool adaptive, bool coupled,
    bool second_order, double alpha, std::optional<double> tau, bool spectral,
    std::optional<double> clamp) {
  const Arguments arguments{x,      weight,  bias, mask,     I_in,    I_out,
                            policy, entropy, H,    energy,   r,       adaptive,
                            coupled, second_order, alpha, tau, spectral, clamp};
  return sharpen(arguments, nullptr);
}

std::tuple<Tensor, Tensor> linear_only(
    const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& mask,
    const Optional& I_in, const Optional& I_out, const Tensor& policy, const Optional& entropy,
    const Optional& H, const Optional& energy, int64_t r, bool adaptive, bool coupled,
    bool second_order, double alpha, std::optional<double> tau, bool spectral,
    std::optional<double> clamp) {
  const Arguments arguments{x,      weight,  bias, mask,     I_in,    I_out,
                            policy, entropy, H,    energy,   r,       adaptive,
                            coupled, second_order, alpha, tau, spectral, clamp};
  Optional selected;
  const Tensor y = sharpen_only(arguments, nullptr, &selected);
  return {y, *selected};
}

}  // namespace
}  // namespace vps

STABLE_TORCH_LIBRARY_IMPL(vps, CPU, m) {
  m.impl("linear", TORCH_BOX(&vps::linear));
  m.impl("linear_only", TORCH_BOX(&vps::linear_only));
}
