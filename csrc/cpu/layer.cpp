// One sharpened layer on a CPU: y = H + b + γ · clamp(H[:, I_out] C Bᵀ). The base product is
// torch's, or for few tokens our own (gemv.inc); the rest is one pass for scores, one to apply.
#include "layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../simd/element.h"
#include "core.h"
#include "statistics.h"

namespace vps {
namespace {

/// One call; its members are what the steps below hand to each other.
class Call {
 public:
  /// With `keep` what the gradient needs outlives the call.
  Call(const Arguments& arguments, const Product* given, bool keep)
      : a_(arguments),
        settings_(arguments.settings),
        given_(given),
        s_(check(arguments)),
        kernels_(kernels(s_.dtype)),
        x_(contiguous(Optional(a_.x)).value()),
        x_data_(x_.data_ptr()),
        bias_(contiguous(a_.bias)),
        mask_(contiguous(a_.mask)),
        counted_(data_or_null<bool>(mask_)),
        counts_(count_tokens(s_.groups, s_.tokens, counted_, workspace_)),
        all_{s_.groups, s_.tokens, counted_, counts_},
        W_(matrix(a_.weight)),
        features_(kept(keep, {s_.groups, 2, settings_.r}, ScalarType::Long)),
        core_(kept(keep, {s_.groups, settings_.r, settings_.r}, ScalarType::Float)),
        gamma_(kept(keep, {s_.groups}, ScalarType::Float)),
        features_data_(numbers<int64_t>(features_, s_.groups * 2 * settings_.r)),
        core_data_(numbers<float>(core_, s_.groups * settings_.r * settings_.r)),
        gamma_data_(numbers<float>(gamma_, s_.groups)) {}

  Results keep() {
    const Tensor t = settings_.clamp ? empty({s_.groups, s_.tokens, settings_.r}, s_.torch_dtype)
                                     : empty({0}, s_.torch_dtype);
    return {run(t.data_ptr()), *features_, *core_, *gamma_, t};
  }

  /// y, and in `t` the selected outputs where a clamp needs them later; both may be null.
  Tensor run(void* t) {
    if (a_.I_in)
      copy_features(*a_.I_in, features(0, 0), 2 * settings_.r);
    else
      pick(x_data_, s_.d_in, features(0, 0), nullptr);
    const bool own = !a_.H && !given_ && is_gemv(s_.groups * s_.tokens, W_);
    const bool picked = own || (given_ && given_->columns);
    if (picked) want_columns(settings_.r);
    const Tensor y = own ? own_product() : product();
    void* const H = y.data_ptr();
    double* energy = workspace_.take<double>(s_.groups);
    if (a_.I_out) copy_features(*a_.I_out, features(0, 1), 2 * settings_.r);
    if (!a_.I_out || (settings_.adaptive && !a_.energy))
      pick(H, s_.d_out, a_.I_out ? nullptr : features(0, 1), energy);
    if (!settings_.adaptive) std::fill(energy, energy + s_.groups, 0.0);
    if (settings_.adaptive && a_.energy)
      for (int64_t g = 0; g < s_.groups; ++g)
        energy[g] = data<float>(*a_.energy)[g * a_.energy->stride(0)];

    const int64_t r = settings_.r, most = decide_all(energy);
    if (!picked) gather(most);
    norms_ = workspace_.take<double>(wanted_.count);
    if (settings_.tau && !settings_.spectral) column_norms();
    parallel(s_.groups, r * (s_.d_in + 50 * r) + s_.tokens * r, [&](int64_t g, int64_t end) {
      Workspace scratch;
      for (; g < end; ++g) build(g, H, scratch);
    });
    update(H, settings_.clamp ? t : nullptr);
    restore(H);
    return y;
  }

  Results hold() {
    const Tensor y = run(nullptr);
    return {y, *features_, *core_, *gamma_, through()};
  }

  /// I_in [G, r].
  Tensor inputs() const {
    const Tensor I_in = empty({s_.groups, settings_.r}, ScalarType::Long);
    for (int64_t g = 0; g < s_.groups; ++g)
      std::copy_n(features(g, 0), settings_.r, data<int64_t>(I_in) + g * settings_.r);
    return I_in;
  }

 private:
  /// E [G, r, d_in] = gamma Cᵀ W[I_out].
  Tensor through() const {
    const int64_t r = settings_.r, d = s_.d_in;
    const Tensor out = empty({s_.groups, r, d}, s_.torch_dtype);
    parallel(s_.groups, r * d, [&](int64_t g, int64_t end) {
      Workspace scratch;
      float* sum = scratch.take<float>(d);
      float* wide = scratch.take<float>(d);
      for (; g < end; ++g)
        for (int64_t c = 0; c < r; ++c) {
          std::fill(sum, sum + d, 0.0f);
          for (int64_t j = 0; j < decisions_[g].active; ++j) {
            const float factor = gamma_data_[g] * core_data_[(g * r + j) * r + c];
            if (factor == 0) continue;
            kernels_.widen(row(W_, features(g, 1)[j], s_.element_size, scratch), d, wide);
            for (int64_t i = 0; i < d; ++i) sum[i] += factor * wide[i];
          }
          narrow(sum, d, s_.dtype, at(out.data_ptr(), (g * r + c) * d));
        }
    });
    return out;
  }

  static Optional kept(bool keep, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return keep ? Optional(empty(sizes, dtype)) : std::nullopt;
  }
  template <class T>
  T* numbers(const Optional& tensor, int64_t count) {
    return tensor ? data<T>(*tensor) : workspace_.take<T>(count);
  }
  std::byte* at(void* elements, int64_t offset) const {
    return static_cast<std::byte*>(elements) + offset * s_.element_size;
  }
  int64_t slot(int64_t g, int64_t c) const { return wanted_.slots[g * used_ + c]; }
  const void* slot_column(int64_t slot) const {
    return columns_ + slot * s_.d_out * s_.element_size;
  }
  const void* column(int64_t g, int64_t c) const { return slot_column(slot(g, c)); }
  int64_t* features(int64_t g, int64_t side) const {
    return features_data_ + (2 * g + side) * settings_.r;
  }
  float value(const void* elements, int64_t i) const {
    if (s_.dtype == Dtype::float32) return static_cast<const float*>(elements)[i];
    if (s_.dtype == Dtype::bfloat16) return static_cast<const BFloat16*>(elements)[i];
    return static_cast<const Half*>(elements)[i];
  }

  /// Best features of values [G, T, width] and, unless null, the energy [G].
  void pick(const void* values, int64_t width, int64_t* features, double* energy) {
    select(kernels_, values, s_.element_size, width, all_, settings_.r, features, 2 * settings_.r,
           energy, workspace_);
  }

  /// The first n features of I_in are those whose columns of W are read.
  void want_columns(int64_t n) {
    const int64_t** chosen = workspace_.take<const int64_t*>(s_.groups);
    for (int64_t g = 0; g < s_.groups; ++g) chosen[g] = features(g, 0);
    used_ = n;
    wanted_ = distinct(chosen, s_.groups, n, s_.d_in, workspace_);
    if (given_ && given_->columns)
      columns_ = static_cast<const std::byte*>(given_->columns);
    else
      columns_ = fresh_ = workspace_.take<std::byte>(n_bytes(wanted_.count));
  }
  int64_t n_bytes(int64_t columns) const { return columns * s_.d_out * s_.element_size; }

  void gather(int64_t n) {
    want_columns(n);
    if (s_.element_size == 4)
      gather_columns<uint32_t>(W_, wanted_, fresh_);
    else
      gather_columns<uint16_t>(W_, wanted_, fresh_);
  }

  /// H by our own GEMV, which picks the wanted columns of W on the way.
  Tensor own_product() {
    Tensor H = empty({s_.groups, s_.tokens, s_.d_out}, s_.torch_dtype);
    gemv(kernels_, s_.dtype, W_, x_data_, s_.groups * s_.tokens, H.data_ptr(), wanted_.features,
         wanted_.count, fresh_, workspace_);
    return H;
  }

  Tensor product() const {
    if (given_) return given_->H;
    if (!a_.H) return base_linear(a_.x, a_.weight, std::nullopt);
    const Tensor y = empty({s_.groups, s_.tokens, s_.d_out}, s_.torch_dtype);
    std::memcpy(y.data_ptr(), contiguous(a_.H)->data_ptr(),
                s_.groups * s_.tokens * s_.d_out * s_.element_size);
    return y;
  }

  /// The policy of every group; returns the largest rank in use.
  int64_t decide_all(const double* energy) {
    decisions_ = workspace_.take<Decision>(s_.groups);
    const double* const entropy = s_.entropy ? &*s_.entropy : nullptr;
    int64_t most = 0;
    for (int64_t g = 0; g < s_.groups; ++g) {
      decisions_[g] = counts_[g]
                          ? decide(s_.policy, entropy, energy[g], settings_.r,
                                   settings_.second_order)
                          : Decision{0, 0, false};
      most = std::max(most, decisions_[g].active);
    }
    return most;
  }

  void column_norms() {
    parallel(wanted_.count, s_.d_out, [&](int64_t c, int64_t end) {
      for (; c < end; ++c)
        norms_[c] = std::sqrt(kernels_.dot(slot_column(c), slot_column(c), s_.d_out));
    });
  }

  /// Gram matrix [a, a] of vectors of `size` elements.
  double* gram(const void* const* vectors, int64_t a, int64_t size, Workspace& scratch) const {
    double* out = scratch.take<double>(a * a);
    for (int64_t i = 0; i < a; ++i)
      for (int64_t j = i; j < a; ++j)
        out[i * a + j] = out[j * a + i] = kernels_.dot(vectors[i], vectors[j], size);
    return out;
  }

  /// T of SC from the selected inputs and outputs of the counted tokens.
  double* coupling(int64_t g, int64_t a, void* H, Workspace& scratch) const {
    double* X = scratch.take<double>(counts_[g] * a);
    double* Y = scratch.take<double>(counts_[g] * a);
    int64_t n = 0;
    for (int64_t i = 0; i < s_.tokens; ++i) {
      const int64_t token = g * s_.tokens + i;
      if (counted_ && !counted_[token]) continue;
      for (int64_t c = 0; c < a; ++c) {
        const float x = value(at(x_data_, token * s_.d_in), features(g, 0)[c]);
        const float h = value(at(H, token * s_.d_out), features(g, 1)[c]);
        X[n * a + c] = std::isfinite(x) ? x : 0;
        Y[n * a + c] = std::isfinite(h) ? h : 0;
      }
      ++n;
    }
    double* T = scratch.take<double>(a * a);
    couple(X, Y, n, a, settings_.alpha, T, scratch.take<double>(couple_work(a)));
    return T;
  }

  /// s [a] of SPEC §4.
  void clip(int64_t g, int64_t a, const double* T, double* scale, Workspace& scratch) const {
    std::fill(scale, scale + a, 1.0);
    if (!settings_.tau || a == 0) return;
    const auto at_least_one = [](double s) { return s < 1 ? 1 : s; };
    const void** vectors = scratch.take<const void*>(a);
    for (int64_t c = 0; c < a; ++c)
      vectors[c] = row(W_, features(g, 1)[c], s_.element_size, scratch);
    if (!settings_.spectral && !T) {
      for (int64_t c = 0; c < a; ++c) {
        const double norm = std::sqrt(kernels_.dot(vectors[c], vectors[c], s_.d_in));
        scale[c] = at_least_one(norm * norms_[slot(g, c)] / *settings_.tau);
      }
      return;
    }
    double* work = scratch.take<double>(2 * a * a);
    double* gram_A = gram(vectors, a, s_.d_in, scratch);
    if (T) mix_gram(T, a, gram_A, work);
    if (!settings_.spectral) {
      for (int64_t c = 0; c < a; ++c) {
        const double norm = std::sqrt(std::max(0.0, gram_A[c * a + c]));
        scale[c] = at_least_one(norm * norms_[slot(g, c)] / *settings_.tau);
      }
      return;
    }
    for (int64_t c = 0; c < a; ++c) vectors[c] = column(g, c);
    double* gram_B = gram(vectors, a, s_.d_out, scratch);
    std::fill(scale, scale + a,
              at_least_one(spectral_norm(gram_A, gram_B, a, work) / *settings_.tau));
  }

  /// Clip and core of one group.
  void build(int64_t g, void* H, Workspace& scratch) {
    const int64_t r = settings_.r;
    float* core = core_data_ + g * r * r;
    std::fill(core, core + r * r, 0.0f);
    const Decision& d = decisions_[g];
    gamma_data_[g] = static_cast<float>(d.gamma);
    const int64_t a = d.active;
    if (a == 0) return;
    const double* T = settings_.coupled ? coupling(g, a, H, scratch) : nullptr;
    double* scale = scratch.take<double>(a);
    clip(g, a, T, scale, scratch);
    double* selected = nullptr;
    if (d.second_order) {
      selected = scratch.take<double>(a * a);
      for (int64_t j = 0; j < a; ++j)
        for (int64_t c = 0; c < a; ++c)
          selected[j * a + c] = value(column(g, c), features(g, 1)[j]);
    }
    double* C = scratch.take<double>(a * a);
    const double* columns = s_.columns.empty() ? nullptr : s_.columns.data();
    build_core(T, scale, selected, columns, d.gamma, a, C, scratch.take<double>(a * a));
    for (int64_t j = 0; j < a; ++j)
      for (int64_t c = 0; c < a; ++c) core[j * r + c] = static_cast<float>(C[j * a + c]);
  }

  /// t of all tokens first, then y in place on H.
  void update(void* y, void* t) {
    const int64_t r = settings_.r, T = s_.tokens, N = s_.groups * T, d = s_.d_out;
    float* u = workspace_.take<float>(N * r);
    parallel(N, r * (r + 16), [&](int64_t n, int64_t end) {
      Workspace scratch;
      float* selected = scratch.take<float>(r);
      for (; n < end; ++n) mix(n, y, t, selected, u + n * r);
    });
    const void** columns = workspace_.take<const void*>(s_.groups * r);
    for (int64_t g = 0; g < s_.groups; ++g)
      for (int64_t c = 0; c < decisions_[g].active; ++c) columns[g * r + c] = column(g, c);
    constexpr int64_t kTokens = 16, kWidth = 1024;
    const int64_t across = (d + kWidth - 1) / kWidth, down = (T + kTokens - 1) / kTokens;
    const void* const bias = bias_ ? bias_->data_ptr() : nullptr;
    const int64_t work = std::min(T, kTokens) * std::min(d, kWidth) * (8 + r) / 8;
    parallel(s_.groups * down * across, work, [&](int64_t i, int64_t end) {
      for (; i < end; ++i) {
        const int64_t g = i / (down * across), n = i / across % down * kTokens;
        const int64_t begin = i % across * kWidth;
        if (counts_[g] == 0) continue;
        const int64_t token = g * T + n;
        kernels_.apply(at(y, token * d), std::min(kTokens, T - n), d, begin,
                       std::min(d, begin + kWidth), u + token * r, r, decisions_[g].active,
                       columns + g * r, bias, gamma_data_[g],
                       settings_.clamp ? static_cast<float>(*settings_.clamp) : -1.0f);
      }
    });
  }

  /// u [r] of token n: its selected outputs times the core, times γ where no clamp comes between.
  void mix(int64_t n, void* H, void* t, float* selected, float* u) const {
    const int64_t r = settings_.r, g = n / s_.tokens, a = decisions_[g].active;
    const float* core = core_data_ + g * r * r;
    for (int64_t c = 0; c < a; ++c)
      selected[c] = value(at(H, n * s_.d_out), features(g, 1)[c]);
    if (t) {
      std::memset(at(t, n * r), 0, r * s_.element_size);
      for (int64_t c = 0; c < a; ++c)
        std::memcpy(at(t, n * r + c), at(H, n * s_.d_out + features(g, 1)[c]), s_.element_size);
    }
    const float scale = settings_.clamp ? 1.0f : gamma_data_[g];
    for (int64_t c = 0; c < a; ++c) {
      float total = 0;
      for (int64_t j = 0; j < a; ++j) total += selected[j] * core[j * r + c];
      u[c] = scale * total;
    }
  }

  /// Whether group g has no counted token, or γ is 0.
  bool is_base(int64_t g) const {
    if (counts_[g] == 0 || gamma_data_[g] == 0) return true;
    return !s_.columns.empty() && std::count(s_.columns.begin(), s_.columns.end(), 0.0) ==
                                      static_cast<int64_t>(s_.columns.size());
  }

  /// Such groups get the very bits of the base layer.
  void restore(void* y) const {
    int64_t first = 0;
    while (first < s_.groups && !is_base(first)) ++first;
    if (first == s_.groups) return;
    const Tensor base = base_linear(a_.x, a_.weight, a_.bias);
    const int64_t size = s_.tokens * s_.d_out;
    for (int64_t g = first; g < s_.groups; ++g)
      if (is_base(g))
        std::memcpy(at(y, g * size), at(base.data_ptr(), g * size), size * s_.element_size);
  }

  const Arguments& a_;
  const Settings& settings_;
  const Product* const given_;
  const Shape s_;
  const Kernels& kernels_;
  const Tensor x_;
  void* const x_data_;
  const Optional bias_, mask_;
  Workspace workspace_;
  const bool* counted_;  // [G, T] or null
  int64_t* counts_;      // counted tokens of each group
  const Tokens all_;
  const Matrix W_;
  const Optional features_, core_, gamma_;
  int64_t* const features_data_;
  float *const core_data_, *const gamma_data_;
  int64_t used_;            // the first so many of I_in [r] that are read
  Distinct wanted_;         // those features
  const std::byte* columns_;  // [wanted, d_out]
  std::byte* fresh_ = nullptr;  // the same, while they are written
  double* norms_;           // [wanted]
  Decision* decisions_;     // [G]
};

}  // namespace

Results sharpen(const Arguments& arguments) { return Call(arguments, nullptr, true).keep(); }

Results hold(const Arguments& arguments, const Product* product) {
  return Call(arguments, product, true).hold();
}

Tensor sharpen_only(const Arguments& arguments, const Product* product, Optional* I_in) {
  Call call(arguments, product, false);
  const Tensor y = call.run(nullptr);
  if (I_in) *I_in = call.inputs();
  return y;
}
}  // namespace vps
