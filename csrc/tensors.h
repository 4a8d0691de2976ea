// Tensors through torch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <initializer_list>
#include <optional>

namespace vps {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

/// By number, without the translation of Tensor::scalar_type(), which takes longer.
inline ScalarType dtype_of(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return static_cast<ScalarType>(dtype);
}

/// An uninitialized contiguous tensor of at most three dims, on the CPU or CUDA device `cuda`.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, int32_t cuda = -1) {
  std::array<int64_t, 3> strides;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i];
  }
  const bool on_cpu = cuda < 0;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.begin(), strides.data(), static_cast<int32_t>(dtype),
      on_cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(), on_cpu ? 0 : cuda,
      &handle));
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

inline Optional contiguous(const Optional& tensor) {
  return tensor && !tensor->is_contiguous() ? torch::stable::contiguous(*tensor) : tensor;
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data_or_null(const Optional& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

}  // namespace vps
