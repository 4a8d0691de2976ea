// One layer whose update a prompt has fixed, y = W(x + Σ_c e_c u(I_in[c])) + b: r dot products a
// token, then the layer's own product. For few tokens that is our own GEMV, which takes x + e in
// float32. For more in 16 bits, rounding x + e could show in y, so e · W[:, I_in] is added to H.
#include "edited.h"

#include <algorithm>
#include <cstring>

#include "../simd/element.h"
#include "statistics.h"

namespace vps {
namespace {

class Edit {
 public:
  explicit Edit(const EditedArguments& a)
      : a_(a),
        s_(check(a)),
        r_(a.I_in.size(1)),
        kernels_(kernels(s_.dtype)),
        x_(contiguous(Optional(a.x)).value()),
        through_(contiguous(Optional(a.through)).value()),
        I_in_(workspace_.take<int64_t>(s_.groups * r_)) {
    copy_features(a.I_in, I_in_, r_);
  }

  Tensor run() {
    const Matrix W = matrix(a_.weight);
    if (is_gemv(count(), W)) return by_gemv(W);
    return s_.dtype == Dtype::float32 ? by_torch() : by_columns(W);
  }

 private:
  int64_t count() const { return s_.groups * s_.tokens; }
  const std::byte* token(int64_t n) const {
    return static_cast<const std::byte*>(x_.data_ptr()) + n * s_.d_in * s_.element_size;
  }
  const int64_t* features(int64_t n) const { return I_in_ + n / s_.tokens * r_; }

  /// e [r] of token n.
  void changes(int64_t n, float* e) const {
    const auto* rows = static_cast<const std::byte*>(through_.data_ptr());
    for (int64_t c = 0; c < r_; ++c) {
      const int64_t row = n / s_.tokens * r_ + c;
      const void* const E = rows + row * s_.d_in * s_.element_size;
      e[c] = static_cast<float>(kernels_.dot(token(n), E, s_.d_in));
    }
  }

  Tensor by_gemv(const Matrix& W) {
    const Tensor y = empty({s_.groups, s_.tokens, s_.d_out}, s_.torch_dtype);
    float* const x = workspace_.take<float>(count() * s_.d_in);
    float* const e = workspace_.take<float>(r_);
    kernels_.widen(x_.data_ptr(), count() * s_.d_in, x);
    for (int64_t n = 0; n < count(); ++n) {
      changes(n, e);
      for (int64_t c = 0; c < r_; ++c) x[n * s_.d_in + features(n)[c]] += e[c];
    }
    const Optional bias = contiguous(a_.bias);
    const void* const b = bias ? bias->data_ptr() : nullptr;
    parallel(W.rows, W.width, [&](int64_t begin, int64_t end) {
      kernels_.gemv(W.data, W.stride, W.rows, W.width, begin, end, x, count(), y.data_ptr(),
                    nullptr, 0, nullptr);
      if (b)
        kernels_.apply(y.data_ptr(), count(), s_.d_out, begin, end, nullptr, 0, 0, nullptr, b,
                       0.0f, -1.0f);
    });
    return y;
  }

  Tensor by_torch() {
    const Tensor changed = empty({s_.groups, s_.tokens, s_.d_in}, s_.torch_dtype);
    parallel(count(), s_.d_in * (r_ + 1), [&](int64_t n, int64_t end) {
      Workspace scratch;
      float* const e = scratch.take<float>(r_);
      for (; n < end; ++n) {
        changes(n, e);
        auto* const out =
            static_cast<std::byte*>(changed.data_ptr()) + n * s_.d_in * s_.element_size;
        std::memcpy(out, token(n), s_.d_in * s_.element_size);
        float* const elements = reinterpret_cast<float*>(out);
        for (int64_t c = 0; c < r_; ++c) elements[features(n)[c]] += e[c];
      }
    });
    return base_linear(changed, a_.weight, a_.bias);
  }

  Tensor by_columns(const Matrix& W) {
    const Tensor y = base_linear(a_.x, a_.weight, std::nullopt);
    const int64_t** chosen = workspace_.take<const int64_t*>(s_.groups);
    for (int64_t g = 0; g < s_.groups; ++g) chosen[g] = I_in_ + g * r_;
    const Distinct wanted = distinct(chosen, s_.groups, r_, s_.d_in, workspace_);
    auto* const columns = workspace_.take<uint16_t>(wanted.count * s_.d_out);
    gather_columns<uint16_t>(W, wanted, columns);
    const void** used = workspace_.take<const void*>(s_.groups * r_);
    for (int64_t i = 0; i < s_.groups * r_; ++i) used[i] = columns + wanted.slots[i] * s_.d_out;
    const Optional bias = contiguous(a_.bias);
    const void* const b = bias ? bias->data_ptr() : nullptr;
    parallel(count(), s_.d_in * r_ + s_.d_out, [&](int64_t n, int64_t end) {
      Workspace scratch;
      float* const e = scratch.take<float>(r_);
      for (; n < end; ++n) {
        changes(n, e);
        auto* const out = static_cast<std::byte*>(y.data_ptr()) + n * s_.d_out * s_.element_size;
        kernels_.apply(out, 1, s_.d_out, 0, s_.d_out, e, r_, r_, used + n / s_.tokens * r_, b, 1.0f,
                       -1.0f);
      }
    });
    return y;
  }

  const EditedArguments& a_;
  const Shape s_;
  const int64_t r_;
  const Kernels& kernels_;
  const Tensor x_, through_;
  Workspace workspace_;
  int64_t* const I_in_;  // [G, r]
};

}  // namespace

Tensor edited(const EditedArguments& arguments) { return Edit(arguments).run(); }

}  // namespace vps
