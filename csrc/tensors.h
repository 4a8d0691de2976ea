// Tensors through torch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>
#include <optional>

namespace vps {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

/// An uninitialized contiguous tensor of at most three dims.
inline Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) {
  std::array<int64_t, 3> strides;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i];
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.data(), dtype,
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor base_linear(const Tensor& x, const Tensor& weight, const Optional& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}

/// g W for g [G, T, d_out], contiguous.
inline Tensor product(const Tensor& g, const Tensor& weight) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(g),
                                    torch::stable::detail::from(weight)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::matmul", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}

inline Optional contiguous(const Optional& tensor) {
  return tensor && !tensor->is_contiguous() ? torch::stable::contiguous(*tensor) : tensor;
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace vps
