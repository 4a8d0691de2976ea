// A query and a key projection of one x on a CPU (SPEC §7), for the schemas of vps/backends/operator.py:
// vps::couple makes their products, pooled energy and selections, vps::linear_pair both layers.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.h"
#include "linear.h"
#include "statistics.h"
#include "tensors.h"

namespace vps {
namespace {

Matrix matrix(const Tensor& W) {
  return {W.data_ptr(), W.size(0), W.size(1), W.stride(0), W.stride(1)};
}

/// c[g, j] of the key's channels, and for each the best query channel of its group.
void contributions(const float* s_q, const float* s_k, int64_t heads, int64_t kv_heads,
                   int64_t size, double* c, int64_t* best) {
  const int64_t per_group = heads / kv_heads;
  for (int64_t g = 0; g < kv_heads; ++g)
    for (int64_t j = 0; j < size; ++j) {
      int64_t place = g * per_group * size + j;
      double total = 0;
      for (int64_t h = 0; h < per_group; ++h) {
        const int64_t channel = (g * per_group + h) * size + j;
        total += s_q[channel];
        if (s_q[channel] > s_q[place]) place = channel;
      }
      best[g * size + j] = place;
      c[g * size + j] = total * s_k[g * size + j];
    }
}

/// The r best of c [count], descending, ties to the lower index.
void best_of(const double* c, int64_t count, int64_t r, int64_t* chosen) {
  int64_t held = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (held == r && !(c[i] > c[chosen[r - 1]])) continue;
    int64_t place = held < r ? held++ : r - 1;
    for (; place > 0 && c[chosen[place - 1]] < c[i]; --place) chosen[place] = chosen[place - 1];
    chosen[place] = i;
  }
}

/// What both projections decide together, and their products.
struct Joint {
  Tensor H_q, H_k;
  Tensor energy;    // [G]
  Tensor features;  // [G, 3, r]: I_in, then I_out of the query and of the key
  const void* columns_q = nullptr;
  const void* columns_k = nullptr;
};

/// `pick`: where our own GEMV runs, it brings the columns of both weights that I_in selects.
Joint join(const JointArguments& a, bool pick, Workspace& workspace) {
  const Shape s = check(a);
  const int64_t d_q = a.W_q.size(0), d_k = s.d_out, T = s.tokens, N = s.groups * T, r = a.r;
  const Kernels& loops = kernels(s.dtype);
  const Tensor rows = contiguous(Optional(a.x)).value();
  const Optional whole_mask = contiguous(a.mask);
  const bool* counted = whole_mask ? data<bool>(*whole_mask) : nullptr;
  const Tokens tokens{s.groups, T, counted, count_tokens(s.groups, T, counted, workspace)};
  Joint out;
  out.features = empty({s.groups, 3, r}, aoti_torch_dtype_int64());
  out.energy = empty({s.groups}, aoti_torch_dtype_float32());
  int64_t* const chosen = data<int64_t>(out.features);
  const int64_t chunk = groups_at_once(s.groups, std::max({s.d_in, d_q, d_k}));
  const auto scores = [&](const Tensor& values, int64_t width, int64_t first, int64_t n, float* to,
                          double* energy) {
    group_scores(loops, values.data_ptr(), s.element_size, width, tokens, first, n, to, energy,
                 workspace);
  };

  if (a.I_in) {
    const int64_t* given = data<int64_t>(*a.I_in);
    for (int64_t g = 0; g < s.groups; ++g)
      for (int64_t c = 0; c < r; ++c)
        chosen[3 * g * r + c] = given[g * a.I_in->stride(0) + c * a.I_in->stride(1)];
  } else {
    float* s_in = workspace.take<float>(chunk * s.d_in);
    for (int64_t first = 0; first < s.groups; first += chunk) {
      const int64_t n = std::min(chunk, s.groups - first);
      scores(rows, s.d_in, first, n, s_in, nullptr);
      parallel(n, s.d_in, [&](int64_t i, int64_t end) {
        Workspace scratch;
        float* best = scratch.take<float>(r);
        for (; i < end; ++i)
          loops.top(s_in + i * s.d_in, s.d_in, r, chosen + 3 * (first + i) * r, best);
      });
    }
  }

  Distinct wanted{nullptr, 0, nullptr};
  if (pick && N <= kMaxGemvTokens) {
    const int64_t** index = workspace.take<const int64_t*>(s.groups);
    for (int64_t g = 0; g < s.groups; ++g) index[g] = chosen + 3 * g * r;
    wanted = distinct(index, s.groups, r, s.d_in, workspace);
  }
  const auto product = [&](const Tensor& weight, const void*& columns) {
    const Matrix W = matrix(weight);
    if (!is_gemv(N, W)) return base_linear(a.x, weight, std::nullopt);
    Tensor H = empty({s.groups, T, W.rows}, s.torch_dtype);
    auto* to = workspace.take<std::byte>(wanted.count * W.rows * s.element_size);
    if (wanted.count) columns = to;
    gemv(loops, s.dtype, W, rows.data_ptr(), N, H.data_ptr(), wanted.features, wanted.count, to,
         workspace);
    return H;
  };
  out.H_q = product(a.W_q, out.columns_q);
  out.H_k = product(a.W_k, out.columns_k);

  float* s_q = workspace.take<float>(chunk * d_q);
  float* s_k = workspace.take<float>(chunk * d_k);
  double* energy_q = workspace.take<double>(s.groups);
  double* energy_k = workspace.take<double>(s.groups);
  for (int64_t first = 0; first < s.groups; first += chunk) {
    const int64_t n = std::min(chunk, s.groups - first);
    scores(out.H_q, d_q, first, n, s_q, energy_q);
    scores(out.H_k, d_k, first, n, s_k, energy_k);
    parallel(n, d_q + 8 * d_k, [&](int64_t i, int64_t end) {
      Workspace scratch;
      double* c = scratch.take<double>(d_k);
      int64_t* best = scratch.take<int64_t>(d_k);
      for (; i < end; ++i) {
        int64_t* I = chosen + 3 * (first + i) * r;
        contributions(s_q + i * d_q, s_k + i * d_k, a.heads, a.kv_heads, d_k / a.kv_heads, c, best);
        best_of(c, d_k, r, I + 2 * r);
        for (int64_t column = 0; column < r; ++column) I[r + column] = best[I[2 * r + column]];
      }
    });
  }
  for (int64_t g = 0; g < s.groups; ++g)
    data<float>(out.energy)[g] =
        static_cast<float>((energy_q[g] * d_q + energy_k[g] * d_k) / (d_q + d_k));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> couple_projections(
    const Tensor& x, const Tensor& W_q, const Tensor& W_k, const Optional& mask,
    const Optional& I_in, int64_t r, int64_t heads, int64_t kv_heads) {
  Workspace workspace;
  const Joint joint = join({x, W_q, W_k, mask, I_in, r, heads, kv_heads}, false, workspace);
  return {joint.H_q, joint.H_k, joint.energy, joint.features};
}

/// Rows `side` of features [G, 3, r] as a tensor of their own.
Tensor side(const Tensor& features, int64_t side) {
  const int64_t groups = features.size(0), r = features.size(2);
  Tensor out = empty({groups, r}, aoti_torch_dtype_int64());
  for (int64_t g = 0; g < groups; ++g)
    std::copy_n(data<int64_t>(features) + (3 * g + side) * r, r, data<int64_t>(out) + g * r);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_pair(
    const Tensor& x, const Tensor& W_q, const Optional& b_q, const Tensor& W_k,
    const Optional& b_k, const Optional& mask, const Optional& I_in, const Tensor& policy,
    const Optional& entropy, int64_t heads, int64_t kv_heads, const Rules& rules,
    const Numbers& numbers, const std::optional<Rules>& rules_k, const Optional& policy_k) {
  const Settings of_query(rules, numbers), of_key(rules_k ? *rules_k : rules, numbers);
  Workspace workspace;
  const Joint joint =
      join({x, W_q, W_k, mask, I_in, of_query.r, heads, kv_heads}, true, workspace);
  const Tensor selected = side(joint.features, 0);
  const Optional known(selected), energy(joint.energy), none;
  const auto layer = [&](const Tensor& W, const Optional& bias, int64_t place,
                         const Settings& settings, const Tensor& bounds, const Tensor& H,
                         const void* columns) {
    const Optional I_out(side(joint.features, place));
    const Arguments arguments{x,      W,       bias, mask,   known,
                              I_out,  bounds,  entropy, none, energy, settings};
    const Product product{H, columns};
    return sharpen_only(arguments, &product, nullptr);
  };
  return {layer(W_q, b_q, 1, of_query, policy, joint.H_q, joint.columns_q),
          layer(W_k, b_k, 2, of_key, policy_k ? *policy_k : policy, joint.H_k, joint.columns_k),
          selected};
}

}  // namespace
}  // namespace vps

STABLE_TORCH_LIBRARY_IMPL(vps, CPU, m) {
  m.impl("couple", TORCH_BOX(&vps::couple_projections));
  m.impl("linear_pair", TORCH_BOX(&vps::linear_pair));
}
