// Checks of arguments: nothing after them can fail or read out of bounds.
#include "arguments.h"

#include <cmath>
#include <iterator>
#include <sstream>
#include <stdexcept>

#include "../simd/element.h"

namespace vps {
namespace {

thread_local const char* operation;  // whose arguments are checked

template <class... Parts>
[[noreturn]] void fail(const char* name, const Parts&... parts) {
  std::ostringstream message;
  message << "vps::" << operation << ": " << name;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

std::string dtype_name(ScalarType dtype) {
  constexpr const char* names[] = {"uint8",   "int8",      "int16",     "int32",
                                   "int64",   "float16",   "float32",   "float64",
                                   "complex32", "complex64", "complex128", "bool"};
  const size_t number = static_cast<size_t>(dtype);
  if (number < std::size(names)) return names[number];
  return dtype == ScalarType::BFloat16 ? "bfloat16" : torch::headeronly::toString(dtype);
}

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i)
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

void check_plain(const char* name, const Tensor& tensor) {
  if (!tensor.defined()) fail(name, " must be a tensor, got an undefined one");
  int32_t device, layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  if (device != aoti_torch_device_type_cpu())
    fail(name, " must be on the CPU as x is, got device type number ", device);
  if (layout != aoti_torch_layout_strided())
    fail(name, " must be a dense strided tensor, got layout number ", layout);
}

void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  if (dtype_of(tensor) != dtype)
    fail(name, " must be ", dtype_name(dtype), ", got ", dtype_name(dtype_of(tensor)));
}

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = tensor.size(i) == sizes.begin()[i];
  if (same) return;
  std::string expected = "[";
  for (const int64_t size : sizes)
    expected += (expected.size() > 1 ? ", " : "") + std::to_string(size);
  fail(name, " must have shape ", expected, "], got ", shape_of(tensor));
}

void check_tensor(const char* name, const Tensor& tensor, ScalarType dtype,
                  std::initializer_list<int64_t> sizes) {
  check_plain(name, tensor);
  check_dtype(name, tensor, dtype);
  check_shape(name, tensor, sizes);
}

void check_indices(const char* name, const Tensor& index, int64_t groups, int64_t r,
                   int64_t limit) {
  check_tensor(name, index, ScalarType::Long, {groups, r});
  const int64_t* elements = data<int64_t>(index);
  const int64_t stride[2] = {index.stride(0), index.stride(1)};
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t c = 0; c < r; ++c) {
      const int64_t value = elements[g * stride[0] + c * stride[1]];
      if (value < 0 || value >= limit)
        fail(name, " must hold features from 0 to ", limit - 1, ", got ", value);
    }
}

/// Reads the policy [9] or [9 + r] into s.
void read_policy(const Tensor& tensor, int64_t r, Shape& s) {
  check_plain("policy", tensor);
  check_dtype("policy", tensor, ScalarType::Double);
  const bool by_column = tensor.dim() == 1 && tensor.size(0) == Policy::kCount + r;
  if (!by_column) check_shape("policy", tensor, {Policy::kCount});
  const double* elements = data<double>(tensor);
  const int64_t stride = tensor.stride(0);
  const auto number = [&](int64_t i) {
    const double value = elements[i * stride];
    if (!std::isfinite(value)) fail("policy", " must be finite, got ", value);
    return value;
  };
  s.policy = {number(0),
              {number(1), number(2)},
              {number(3), number(4)},
              {number(5), number(6)},
              {number(7), number(8)}};
  for (int64_t c = 0; by_column && c < r; ++c) s.columns.push_back(number(Policy::kCount + c));
}

/// Checks rows [G, T, width], x or g, and a weight [d_out, d_in], all but the width.
Shape check_pair(const char* rows_name, const char* width, const Tensor& rows, const char* name,
                 const Tensor& weight) {
  Shape s;
  check_plain(rows_name, rows);
  check_plain(name, weight);
  s.torch_dtype = dtype_of(rows);
  if (s.torch_dtype == ScalarType::Float)
    s.dtype = Dtype::float32;
  else if (s.torch_dtype == ScalarType::BFloat16)
    s.dtype = Dtype::bfloat16;
  else if (s.torch_dtype == ScalarType::Half)
    s.dtype = Dtype::float16;
  else
    fail(rows_name, " must be float32, bfloat16 or float16, got ", dtype_name(s.torch_dtype));
  s.element_size = s.dtype == Dtype::float32 ? 4 : 2;
  if (rows.dim() != 3)
    fail(rows_name, " must have shape [G, T, ", width, "], got ", shape_of(rows));
  if (weight.dim() != 2) fail(name, " must have shape [d_out, d_in], got ", shape_of(weight));
  s.groups = rows.size(0);
  s.tokens = rows.size(1);
  s.d_out = weight.size(0);
  s.d_in = weight.size(1);
  if (s.groups < 1 || s.tokens < 1)
    fail(rows_name, " must not be empty, got ", shape_of(rows));
  if (s.d_in < 1 || s.d_out < 1) fail(name, " must not be empty, got ", shape_of(weight));
  check_dtype(name, weight, s.torch_dtype);
  return s;
}

/// Checks x [G, T, d_in] and a weight [d_out, d_in].
Shape check_product(const Tensor& x, const char* name, const Tensor& weight) {
  const Shape s = check_pair("x", "d_in", x, name, weight);
  check_shape("x", x, {s.groups, s.tokens, s.d_in});
  return s;
}

void check_mask(const Optional& mask, const Shape& s) {
  if (mask) check_tensor("mask", *mask, ScalarType::Bool, {s.groups, s.tokens});
}

}  // namespace

Shape check(const JointArguments& a) {
  operation = "couple";
  const Shape q = check_product(a.x, "W_q", a.W_q), k = check_product(a.x, "W_k", a.W_k);
  check_mask(a.mask, k);
  if (a.kv_heads < 1 || k.d_out % a.kv_heads)
    fail("kv_heads", " must divide the ", k.d_out, " rows of W_k, got ", a.kv_heads);
  if (a.heads < 1 || a.heads % a.kv_heads || q.d_out % a.heads ||
      q.d_out / a.heads != k.d_out / a.kv_heads)
    fail("heads", " must be a multiple of kv_heads that makes heads of size ",
         k.d_out / a.kv_heads, " of the ", q.d_out, " rows of W_q, got ", a.heads);
  const int64_t limit = std::min(k.d_in, k.d_out);
  if (a.r < 1 || a.r > limit)
    fail("r", " must be from 1 to min(d_in, d_k) = ", limit, ", got ", a.r);
  if (a.I_in) check_indices("I_in", *a.I_in, k.groups, a.r, k.d_in);
  return k;
}

Shape check(const Arguments& a) {
  operation = "linear";
  const Settings& set = a.settings;
  Shape s = check_product(a.x, "weight", a.weight);
  if (a.bias) check_tensor("bias", *a.bias, s.torch_dtype, {s.d_out});
  check_mask(a.mask, s);
  if (a.H) check_tensor("H", *a.H, s.torch_dtype, {s.groups, s.tokens, s.d_out});
  if (a.energy) {
    check_tensor("energy", *a.energy, ScalarType::Float, {s.groups});
    const float* energy = data<float>(*a.energy);
    for (int64_t g = 0; g < s.groups; ++g)
      if (const float value = energy[g * a.energy->stride(0)]; !(value >= 0))
        fail("energy", " must not be negative, got ", value);
  }
  const int64_t limit = std::min(s.d_in, s.d_out);
  if (set.r < 1 || set.r > limit)
    fail("r", " must be from 1 to min(d_in, d_out) = ", limit, ", got ", set.r);
  if (a.I_in) check_indices("I_in", *a.I_in, s.groups, set.r, s.d_in);
  if (a.I_out) check_indices("I_out", *a.I_out, s.groups, set.r, s.d_out);
  read_policy(a.policy, set.r, s);
  if (a.entropy) {
    check_tensor("entropy", *a.entropy, ScalarType::Double, {2});
    const double* const signals = data<double>(*a.entropy);
    const double nats = signals[0], factor = signals[a.entropy->stride(0)];
    if (!(nats < 0)) s.entropy = nats;
    s.policy.factor *= factor;
  }
  if (set.coupled && !(set.alpha > 0 && std::isfinite(set.alpha)))
    fail("alpha", " must be positive and finite, got ", set.alpha);
  if (set.tau && !(*set.tau > 0)) fail("tau", " must be positive, got ", *set.tau);
  if (set.clamp && !(*set.clamp >= 0)) fail("clamp", " must not be negative, got ", *set.clamp);
  return s;
}

Shape check(const BackwardArguments& a) {
  operation = "linear_backward";
  const Shape s = check_pair("g", "d_out", a.g, "weight", a.weight);
  check_shape("g", a.g, {s.groups, s.tokens, s.d_out});
  check_plain("features", a.features);
  if (a.features.dim() != 3) fail("features", " must be [G, 2, r], got ", shape_of(a.features));
  const int64_t r = a.features.size(2), limit = std::min(s.d_in, s.d_out);
  if (r < 1 || r > limit)
    fail("features", " must hold 1 to min(d_in, d_out) = ", limit, " a side, got ", r);
  check_tensor("features", a.features, ScalarType::Long, {s.groups, 2, r});
  check_indices("features[:, 0]", torch::stable::select(a.features, 1, 0), s.groups, r, s.d_in);
  check_indices("features[:, 1]", torch::stable::select(a.features, 1, 1), s.groups, r, s.d_out);
  check_tensor("core", a.core, ScalarType::Float, {s.groups, r, r});
  check_tensor("gamma", a.gamma, ScalarType::Float, {s.groups});
  return s;
}

Shape check(const EditedArguments& a) {
  operation = "edited";
  const Shape s = check_product(a.x, "weight", a.weight);
  if (a.bias) check_tensor("bias", *a.bias, s.torch_dtype, {s.d_out});
  check_plain("I_in", a.I_in);
  if (a.I_in.dim() != 2) fail("I_in", " must be [G, r], got ", shape_of(a.I_in));
  const int64_t r = a.I_in.size(1);
  check_indices("I_in", a.I_in, s.groups, r, s.d_in);
  check_tensor("through", a.through, s.torch_dtype, {s.groups, r, s.d_in});
  return s;
}

}  // namespace vps
