// The arguments of the operators on a CPU, and their checks.
#pragma once

#include <optional>
#include <vector>

#include "../policy.h"
#include "../settings.h"
#include "../simd/kernels.h"
#include "../tensors.h"

namespace vps {

/// Of one sharpened layer.
struct Arguments {
  const Tensor& x;          // [G, T, d_in]
  const Tensor& weight;     // [d_out, d_in]
  const Optional& bias;     // [d_out]
  const Optional& mask;     // bool [G, T]
  const Optional& I_in;     // int64 [G, r]
  const Optional& I_out;    // int64 [G, r]
  const Tensor& policy;     // float64 [9], or [9 + r] with a factor of each column
  const Optional& entropy;  // float64 [2]: nats or -1, and the factor of the history
  const Optional& H;        // [G, T, d_out], contiguous
  const Optional& energy;   // float32 [G]
  const Settings settings;
};

/// Of what a query and a key projection of one x decide together.
struct JointArguments {
  const Tensor& x;       // [G, T, d_in]
  const Tensor& W_q;     // [d_q, d_in]
  const Tensor& W_k;     // [d_k, d_in]
  const Optional& mask;  // bool [G, T]
  const Optional& I_in;  // int64 [G, r]
  int64_t r, heads, kv_heads;
};

/// Of the backward pass of a sharpened layer without a clamp.
struct BackwardArguments {
  const Tensor& g;         // [G, T, d_out]
  const Tensor& weight;    // [d_out, d_in]
  const Tensor& features;  // int64 [G, 2, r]
  const Tensor& core;      // float32 [G, r, r]
  const Tensor& gamma;     // float32 [G]
};

/// Of a layer whose update a prompt has fixed.
struct EditedArguments {
  const Tensor& x;        // [G, T, d_in]
  const Tensor& weight;   // [d_out, d_in]
  const Optional& bias;   // [d_out]
  const Tensor& I_in;     // int64 [G, r]
  const Tensor& through;  // E [G, r, d_in]
};

/// What the checks read from the arguments.
struct Shape {
  Dtype dtype;
  ScalarType torch_dtype;
  int64_t element_size;
  int64_t groups, tokens, d_in, d_out;
  Policy policy;
  std::vector<double> columns;  // factor of each column [r], or empty for 1 everywhere
  std::optional<double> entropy;
};

/// Raise std::invalid_argument naming the argument, what it must be and what it is. For a query
/// and a key the shape is that of the key's product.
Shape check(const Arguments& a);
Shape check(const JointArguments& a);
Shape check(const BackwardArguments& a);
Shape check(const EditedArguments& a);

}  // namespace vps
