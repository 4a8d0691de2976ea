// A query and a key projection of one x on a CPU (SPEC §7): joint decision, and both layers.
#include "pair.h"

#include "statistics.h"

namespace vps {
namespace {

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

/// Rows `side` of features [G, 3, r] as a tensor of their own.
Tensor side(const Tensor& features, int64_t side) {
  const int64_t groups = features.size(0), r = features.size(2);
  Tensor out = empty({groups, r}, ScalarType::Long);
  for (int64_t g = 0; g < groups; ++g)
    std::copy_n(data<int64_t>(features) + (3 * g + side) * r, r, data<int64_t>(out) + g * r);
  return out;
}

}  // namespace

Joint join(const JointArguments& a, bool pick, Workspace& workspace) {
  const Shape s = check(a);
  const int64_t d_q = a.W_q.size(0), d_k = s.d_out, T = s.tokens, N = s.groups * T, r = a.r;
  const Kernels& loops = kernels(s.dtype);
  const Tensor rows = contiguous(Optional(a.x)).value();
  const Optional whole_mask = contiguous(a.mask);
  const bool* counted = data_or_null<bool>(whole_mask);
  const Tokens tokens{s.groups, T, counted, count_tokens(s.groups, T, counted, workspace)};
  Joint out;
  out.features = empty({s.groups, 3, r}, ScalarType::Long);
  out.energy = empty({s.groups}, ScalarType::Float);
  int64_t* const chosen = data<int64_t>(out.features);
  const int64_t chunk = groups_at_once(s.groups, std::max(d_q, d_k));
  const auto scores = [&](const Tensor& values, int64_t width, int64_t first, int64_t n, float* to,
                          double* energy) {
    group_scores(loops, values.data_ptr(), s.element_size, width, tokens, first, n, to, energy,
                 workspace);
  };

  if (a.I_in)
    copy_features(*a.I_in, chosen, 3 * r);
  else
    select(loops, rows.data_ptr(), s.element_size, s.d_in, tokens, r, chosen, 3 * r, nullptr,
           workspace);
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

namespace {

/// f(arguments, product) of the query and of the key, and the joint decision.
template <class F>
auto each(const PairArguments& a, const F& f) {
  Workspace workspace;
  const Joint joint = join(a.joint, true, workspace);
  const Optional known(side(joint.features, 0)), energy(joint.energy), none;
  const auto layer = [&](const Tensor& W, const Optional& bias, int64_t place,
                         const Settings& settings, const Tensor& policy, const Product& product) {
    const Optional I_out(side(joint.features, place));
    return f({a.joint.x, W, bias, a.joint.mask, known, I_out, policy, a.entropy, none, energy,
              settings},
             product);
  };
  return std::tuple(layer(a.joint.W_q, a.b_q, 1, a.of_query, a.policy, {joint.H_q, joint.columns_q}),
                    layer(a.joint.W_k, a.b_k, 2, a.of_key, a.policy_k ? *a.policy_k : a.policy,
                          {joint.H_k, joint.columns_k}),
                    *known);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> sharpen_pair(const PairArguments& a) {
  return each(a, [](const Arguments& own, const Product& product) {
    return sharpen_only(own, &product, nullptr);
  });
}

std::tuple<Results, Results> hold_pair(const PairArguments& a) {
  auto [query, key, I_in] = each(a, [](const Arguments& own, const Product& product) {
    return hold(own, &product);
  });
  return {query, key};
}

}  // namespace vps
