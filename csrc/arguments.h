// The arguments of vps::linear and the operators beside it, checked.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "core.h"
#include "kernels.h"
#include "settings.h"

namespace vps {

using torch::stable::Tensor;

struct Arguments {
  const Tensor& x;                       // [G, T, d_in]
  const Tensor& weight;                  // [d_out, d_in]
  const std::optional<Tensor>& bias;     // [d_out]
  const std::optional<Tensor>& mask;     // bool [G, T]
  const std::optional<Tensor>& I_in;     // int64 [G, r]
  const std::optional<Tensor>& I_out;    // int64 [G, r]
  const Tensor& policy;                  // float64 [9], or [9 + r] with a factor of each column
  const std::optional<Tensor>& entropy;  // floating, one element
  const std::optional<Tensor>& H;        // [G, T, d_out], contiguous
  const std::optional<Tensor>& energy;   // float32 [G]
  const Settings settings;
};

/// What the checks read from the arguments.
struct Shape {
  Dtype dtype;
  int32_t torch_dtype;
  int64_t element_size;
  int64_t groups, tokens, d_in, d_out;
  Policy policy;
  std::optional<double> entropy;
};

/// What a query and a key projection of one x decide together.
struct JointArguments {
  const Tensor& x;                    // [G, T, d_in]
  const Tensor& W_q;                  // [d_q, d_in]
  const Tensor& W_k;                  // [d_k, d_in]
  const std::optional<Tensor>& mask;  // bool [G, T]
  const std::optional<Tensor>& I_in;  // int64 [G, r]
  int64_t r, heads, kv_heads;
};

/// What the backward pass of a sharpened layer needs, without a clamp.
struct BackwardArguments {
  const Tensor& g;         // [G, T, d_out]
  const Tensor& weight;    // [d_out, d_in]
  const Tensor& features;  // int64 [G, 2, r]
  const Tensor& core;      // float32 [G, r, r]
  const Tensor& gamma;     // float32 [G]
};

/// Raise std::invalid_argument naming the argument, what it must be and what it is. Of a
/// query and a key the shape is that of the key's product.
Shape check(const Arguments& a);
Shape check(const JointArguments& a);
Shape check(const BackwardArguments& a);

}  // namespace vps
