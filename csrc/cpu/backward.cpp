// The backward pass on a CPU: ∂L/∂x = g W + γ (g B) Cᵀ W[I_out], in one pass over g W, whose
// columns I_in are g B.
#include "backward.h"

#include <algorithm>

#include "../simd/element.h"
#include "gather.h"

namespace vps {
namespace {

/// Columns of core [r, r] up to the last that is not 0: the rank in use.
int64_t active(const float* core, int64_t r) {
  int64_t a = 0;
  for (int64_t i = 0; i < r * r; ++i)
    if (core[i] != 0) a = std::max(a, std::max(i / r, i % r) + 1);
  return a;
}

template <class T>
Tensor backward(const BackwardArguments& a, const Shape& s) {
  const Tensor grad_x = torch::stable::contiguous(torch::stable::matmul(a.g, a.weight));
  const Matrix W = matrix(a.weight);
  const int64_t r = a.features.size(2), N = s.tokens, d = s.d_in;
  const Tensor features = torch::stable::contiguous(a.features);
  const Tensor cores = torch::stable::contiguous(a.core);
  const Kernels& loops = kernels(s.dtype);
  T* const out = data<T>(grad_x);
  Workspace workspace;
  float* u = workspace.take<float>(s.groups * N * r);
  const void** rows = workspace.take<const void*>(s.groups * r);
  int64_t* used = workspace.take<int64_t>(s.groups);
  for (int64_t g = 0; g < s.groups; ++g) {
    const float gamma = data<float>(a.gamma)[g * a.gamma.stride(0)];
    const int64_t* I = data<int64_t>(features) + 2 * g * r;
    used[g] = gamma == 0 ? 0 : active(data<float>(cores) + g * r * r, r);
    for (int64_t j = 0; j < used[g]; ++j)
      rows[g * r + j] = row(W, I[r + j], s.element_size, workspace);
  }
  parallel(s.groups * N, r * (r + 16), [&](int64_t n, int64_t end) {
    for (; n < end; ++n) {
      const int64_t g = n / N;
      const float gamma = data<float>(a.gamma)[g * a.gamma.stride(0)];
      const int64_t* I_in = data<int64_t>(features) + 2 * g * r;
      const float* core = data<float>(cores) + g * r * r;
      for (int64_t j = 0; j < used[g]; ++j) {
        float total = 0;
        for (int64_t c = 0; c < used[g]; ++c)
          total += core[j * r + c] * static_cast<float>(out[n * d + I_in[c]]);
        u[n * r + j] = gamma * total;
      }
    }
  });
  constexpr int64_t kTokens = 16;
  const int64_t down = (N + kTokens - 1) / kTokens;
  parallel(s.groups * down, std::min(N, kTokens) * d * (8 + r) / 8, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) {
      const int64_t g = i / down, n = i % down * kTokens, token = g * N + n;
      loops.apply(out + token * d, std::min(kTokens, N - n), d, 0, d, u + token * r, r, used[g],
                  rows + g * r, nullptr, 1.0f, -1.0f);
    }
  });
  return grad_x;
}

}  // namespace

Tensor backward(const BackwardArguments& arguments) {
  const Shape s = check(arguments);
  if (s.dtype == Dtype::float32) return backward<float>(arguments, s);
  if (s.dtype == Dtype::bfloat16) return backward<BFloat16>(arguments, s);
  return backward<Half>(arguments, s);
}

}  // namespace vps
