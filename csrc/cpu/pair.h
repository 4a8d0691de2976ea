// A query and a key projection of one x (SPEC §7).
#pragma once

#include <tuple>

#include "layer.h"
#include "workspace.h"

namespace vps {

/// What both projections decide together, and their products.
struct Joint {
  Tensor H_q, H_k;
  Tensor energy;    // [G]
  Tensor features;  // [G, 3, r]: I_in, then I_out of the query and of the key
  const void* columns_q = nullptr;
  const void* columns_k = nullptr;
};

/// With `pick` our own GEMV, where it runs, brings the columns of both weights that I_in selects.
Joint join(const JointArguments& arguments, bool pick, Workspace& workspace);

struct PairArguments {
  JointArguments joint;
  const Optional& b_q;       // [d_q]
  const Optional& b_k;       // [d_k]
  const Tensor& policy;      // as of one layer
  const Optional& policy_k;  // that of the key, where it has its own
  const Optional& entropy;   // float64 [2]
  Settings of_query, of_key;
};

/// Outputs of the query and of the key, and I_in [G, r].
std::tuple<Tensor, Tensor, Tensor> sharpen_pair(const PairArguments& arguments);

/// What `hold` gives for the query and for the key.
std::tuple<Results, Results> hold_pair(const PairArguments& arguments);

}  // namespace vps
