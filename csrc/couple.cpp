// vps::couple on a CPU: base products, pooled energy and selections of a query and a key
// projection of one x (SPEC §7), registered for the schema of vps/operator.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.h"
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

std::tuple<Tensor, Tensor, Tensor, Tensor> couple_projections(const Tensor& x, const Tensor& W_q,
                                                  const Tensor& W_k, const Optional& mask,
                                                  const Optional& I_in, int64_t r, int64_t heads,
                                                  int64_t kv_heads) {
  const JointArguments arguments{x, W_q, W_k, mask, I_in, r, heads, kv_heads};
  const Shape s = check(arguments);
  const int64_t d_q = W_q.size(0), d_k = s.d_out, T = s.tokens, N = s.groups * T;
  const Kernels& loops = kernels(s.dtype);
  Workspace workspace;
  const Tensor rows = contiguous(Optional(x)).value();
  const Optional whole_mask = contiguous(mask);
  const bool* counted = whole_mask ? data<bool>(*whole_mask) : nullptr;
  const Tokens tokens{s.groups, T, counted, count_tokens(s.groups, T, counted, workspace)};
  const Tensor features = empty({s.groups, 3, r}, aoti_torch_dtype_int64());
  const Tensor energy = empty({s.groups}, aoti_torch_dtype_float32());
  int64_t* const chosen = data<int64_t>(features);

  const auto product = [&](const Tensor& weight) {
    const Matrix W = matrix(weight);
    if (!is_gemv(N, W)) return base_linear(x, weight, std::nullopt);
    Tensor H = empty({s.groups, T, W.rows}, s.torch_dtype);
    gemv(loops, s.dtype, W, rows.data_ptr(), N, H.data_ptr(), nullptr, 0, nullptr, workspace);
    return H;
  };
  const Tensor H_q = product(W_q), H_k = product(W_k);

  if (I_in) {
    const int64_t* given = data<int64_t>(*I_in);
    for (int64_t g = 0; g < s.groups; ++g)
      for (int64_t c = 0; c < r; ++c)
        chosen[3 * g * r + c] = given[g * I_in->stride(0) + c * I_in->stride(1)];
  }
  const int64_t chunk = groups_at_once(s.groups, std::max({s.d_in, d_q, d_k}));
  float* s_in = workspace.take<float>(chunk * s.d_in);
  float* s_q = workspace.take<float>(chunk * d_q);
  float* s_k = workspace.take<float>(chunk * d_k);
  double* energy_q = workspace.take<double>(s.groups);
  double* energy_k = workspace.take<double>(s.groups);
  for (int64_t first = 0; first < s.groups; first += chunk) {
    const int64_t n = std::min(chunk, s.groups - first);
    const auto scores = [&](const Tensor& values, int64_t width, float* out, double* squares) {
      group_scores(loops, values.data_ptr(), s.element_size, width, tokens, first, n, out, squares,
                   workspace);
    };
    if (!I_in) scores(rows, s.d_in, s_in, nullptr);
    scores(H_q, d_q, s_q, energy_q);
    scores(H_k, d_k, s_k, energy_k);
    parallel(n, d_q + 8 * d_k, [&](int64_t i, int64_t end) {
      Workspace scratch;
      double* c = scratch.take<double>(d_k);
      int64_t* best = scratch.take<int64_t>(d_k);
      float* top = scratch.take<float>(r);
      for (; i < end; ++i) {
        int64_t* I = chosen + 3 * (first + i) * r;
        if (!I_in) loops.top(s_in + i * s.d_in, s.d_in, r, I, top);
        contributions(s_q + i * d_q, s_k + i * d_k, heads, kv_heads, d_k / kv_heads, c, best);
        best_of(c, d_k, r, I + 2 * r);
        for (int64_t column = 0; column < r; ++column) I[r + column] = best[I[2 * r + column]];
      }
    });
  }
  for (int64_t g = 0; g < s.groups; ++g)
    data<float>(energy)[g] =
        static_cast<float>((energy_q[g] * d_q + energy_k[g] * d_k) / (d_q + d_k));
  return {H_q, H_k, energy, features};
}

}  // namespace
}  // namespace vps

STABLE_TORCH_LIBRARY_IMPL(vps, CPU, m) { m.impl("couple", TORCH_BOX(&vps::couple_projections)); }
