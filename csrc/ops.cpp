// The operators on a CPU, registered for their schemas in vps/backends/operator.py.
#include <torch/csrc/stable/library.h>

#include "cpu/backward.h"
#include "cpu/edited.h"
#include "cpu/pair.h"

namespace vps {
namespace {

enum class Kind { keep, only, hold };

/// vps::linear; vps::linear_only, y and I_in without what a gradient needs; vps::linear_held.
template <Kind kind>
auto linear(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& mask,
            const Optional& I_in, const Optional& I_out, const Tensor& policy,
            const Optional& entropy, const Optional& H, const Optional& energy, const Rules& rules,
            const Numbers& numbers) {
  const Arguments arguments{x,      weight,  bias, mask,   I_in,           I_out,
                            policy, entropy, H,    energy, {rules, numbers}};
  if constexpr (kind == Kind::keep) {
    return sharpen(arguments);
  } else if constexpr (kind == Kind::hold) {
    return hold(arguments, nullptr);
  } else {
    Optional selected;
    const Tensor y = sharpen_only(arguments, nullptr, &selected);
    return std::tuple(y, *selected);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> couple(
    const Tensor& x, const Tensor& W_q, const Tensor& W_k, const Optional& mask,
    const Optional& I_in, int64_t r, int64_t heads, int64_t kv_heads) {
  Workspace workspace;
  const Joint joint = join({x, W_q, W_k, mask, I_in, r, heads, kv_heads}, false, workspace);
  return {joint.H_q, joint.H_k, joint.energy, joint.features};
}

/// vps::linear_pair, or vps::linear_pair_held.
template <bool held>
auto linear_pair(
    const Tensor& x, const Tensor& W_q, const Optional& b_q, const Tensor& W_k, const Optional& b_k,
    const Optional& mask, const Optional& I_in, const Tensor& policy, const Optional& entropy,
    int64_t heads, int64_t kv_heads, const Rules& rules, const Numbers& numbers,
    const std::optional<Rules>& rules_k, const Optional& policy_k) {
  const Settings of_query(rules, numbers);
  const PairArguments arguments{{x, W_q, W_k, mask, I_in, of_query.r, heads, kv_heads},
                                b_q,
                                b_k,
                                policy,
                                policy_k,
                                entropy,
                                of_query,
                                {rules_k ? *rules_k : rules, numbers}};
  if constexpr (held) {
    const auto [query, key] = hold_pair(arguments);
    return std::tuple_cat(query, key);
  } else {
    return sharpen_pair(arguments);
  }
}

Tensor linear_backward(const Tensor& g, const Tensor& weight, const Tensor& features,
                       const Tensor& core, const Tensor& gamma) {
  return backward({g, weight, features, core, gamma});
}

Tensor edited_linear(const Tensor& x, const Tensor& weight, const Optional& bias,
                     const Tensor& I_in, const Tensor& through) {
  return edited({x, weight, bias, I_in, through});
}

}  // namespace
}  // namespace vps

STABLE_TORCH_LIBRARY_IMPL(vps, CPU, m) {
  m.impl("linear", TORCH_BOX(&vps::linear<vps::Kind::keep>));
  m.impl("linear_only", TORCH_BOX(&vps::linear<vps::Kind::only>));
  m.impl("linear_held", TORCH_BOX(&vps::linear<vps::Kind::hold>));
  m.impl("couple", TORCH_BOX(&vps::couple));
  m.impl("linear_pair", TORCH_BOX(&vps::linear_pair<false>));
  m.impl("linear_pair_held", TORCH_BOX(&vps::linear_pair<true>));
  m.impl("linear_backward", TORCH_BOX(&vps::linear_backward));
  m.impl("edited", TORCH_BOX(&vps::edited_linear));
}
