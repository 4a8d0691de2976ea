// vps::cooperative_decode: decode.cuh for torch, through its stable ABI.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <stdexcept>
#include <tuple>

#include "../settings.h"
#include "../tensors.h"
#include "decode.cuh"

namespace vps {
namespace {

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("vps::cooperative_decode: ") + what);
}

void check(const Optional& tensor, int32_t device, ScalarType dtype,
           std::initializer_list<int64_t> sizes, const char* what) {
  if (!tensor) return;
  bool holds = tensor->defined() && tensor->is_cuda() && tensor->get_device() == device &&
               dtype_of(*tensor) == dtype && tensor->dim() == static_cast<int64_t>(sizes.size());
  for (int64_t i = 0; holds && i < tensor->dim(); ++i)
    holds = tensor->size(i) == sizes.begin()[i];
  require(holds && tensor->is_contiguous(), what);
}

/// Makes a device current for as long as it lives, and gives the caller's back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    succeed(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) succeed(cudaSetDevice(device), "cudaSetDevice");
    moved_ = before_ != device;
  }
  ~DeviceGuard() {
    if (moved_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> decode(
    const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& counted,
    const Optional& I_in, const Optional& I_out, const Tensor& policy, const Optional& entropy,
    const Rules& rules, const Numbers& numbers) {
  const Settings settings(rules, numbers);
  const auto [r, tau, clamp] = std::tuple(settings.r, settings.tau, settings.clamp);
  require(!settings.coupled && !settings.spectral && !settings.second_order,
          "rules must be plain selection, component clip and first order");
  require(x.defined() && x.is_cuda() && weight.defined() && weight.dim() == 2,
          "x must be a CUDA tensor [1, 1, d_in] and weight a matrix [d_out, d_in]");
  const int32_t device = x.get_device();
  const ScalarType dtype = dtype_of(x);
  const int64_t d_out = weight.size(0), d_in = weight.size(1);
  const bool is_float = dtype == ScalarType::Float, is_half = dtype == ScalarType::Half;
  require(is_float || is_half || dtype == ScalarType::BFloat16,
          "x must be float32, float16 or bfloat16");
  require(d_in > 0 && d_in < (1 << 20) && d_out > 0 && d_out < (1 << 24),
          "weight must have 1 to 2^20 columns and 1 to 2^24 rows");
  require(r >= 1 && r <= std::min<int64_t>({kLargestR, d_in, d_out}),
          "r must be from 1 to 8, at most d_in and d_out");
  require(!tau || *tau > 0, "tau must be positive");
  require(!clamp || *clamp > 0, "clamp must be positive");
  require(weight.is_cuda() && weight.get_device() == device && dtype_of(weight) == dtype &&
              weight.stride(1) == 1 && weight.stride(0) >= d_in,
          "weight must be on the device of x, of its dtype, with rows of unit step");
  check(x, device, dtype, {1, 1, d_in}, "x must be contiguous [1, 1, d_in]");
  check(bias, device, dtype, {d_out}, "bias must be [d_out], like x");
  check(counted, device, ScalarType::Bool, {1, 1}, "counted must be bool [1, 1]");
  check(I_in, device, ScalarType::Long, {1, r}, "I_in must be int64 [1, r], contiguous");
  check(I_out, device, ScalarType::Long, {1, r}, "I_out must be int64 [1, r], contiguous");
  constexpr int64_t kPolicy = Policy::kCount;
  const bool by_column = policy.defined() && policy.dim() == 1 && policy.size(0) == kPolicy + r;
  check(policy, device, ScalarType::Double, {by_column ? kPolicy + r : kPolicy},
        "policy must be float64 [9] or [9 + r]");
  check(entropy, device, ScalarType::Double, {2}, "entropy must be float64 [2]");

  const ScalarType single = ScalarType::Float;
  Tensor y = empty({1, 1, d_out}, dtype, device);
  Tensor features = empty({1, 2, r}, ScalarType::Long, device);
  Tensor core = empty({1, r, r}, single, device), gamma = empty({1}, single, device);
  Tensor t = clamp ? empty({1, 1, r}, dtype, device) : empty({0}, dtype, device);

  Decode p{};
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  p.bias = data_or_null<void>(bias);
  p.counted = data_or_null<bool>(counted);
  p.I_in = data_or_null<int64_t>(I_in);
  p.I_out = data_or_null<int64_t>(I_out);
  p.policy = data<Policy>(policy);
  p.columns = by_column ? data<double>(policy) + kPolicy : nullptr;
  p.entropy = data_or_null<double>(entropy);
  p.y = y.data_ptr();
  p.features = data<int64_t>(features);
  p.core = data<float>(core);
  p.gamma = data<float>(gamma);
  p.t = clamp ? t.data_ptr() : nullptr;
  p.row_stride = weight.stride(0);
  p.d_in = static_cast<int>(d_in);
  p.d_out = static_cast<int>(d_out);
  p.r = static_cast<int>(r);
  p.inverse_width = 1.0 / static_cast<double>(d_out);
  p.adaptive = settings.adaptive;
  p.tau = tau ? static_cast<float>(*tau) : -1.0f;
  p.clamp = clamp ? static_cast<float>(*clamp) : -1.0f;

  const DeviceGuard guard(device);
  const void* const kernel =
      is_float ? reinterpret_cast<const void*>(decode_kernel<float>)
      : is_half ? reinterpret_cast<const void*>(decode_kernel<__half>)
                : reinterpret_cast<const void*>(decode_kernel<__nv_bfloat16>);
  const Plan found = plan(kernel, device, p.d_in, p.d_out, p.r);
  p.rows_per_block = found.rows_per_block;
  // Scratch of this call, from torch's allocator: it belongs to this stream.
  const int64_t blocks = found.blocks;
  Tensor records = empty({blocks * r, sizeof(Record) / sizeof(float)}, single, device);
  Tensor sums = empty({1 + r, blocks}, single, device);
  p.records = reinterpret_cast<Record*>(data<float>(records));
  p.sums = data<float>(sums);

  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  void* arguments[] = {&p};
  succeed(cudaLaunchCooperativeKernel(kernel, dim3(found.blocks), dim3(kThreads), arguments,
                                      found.bytes, static_cast<cudaStream_t>(stream)),
          "cudaLaunchCooperativeKernel");
  return {y, features, core, gamma, t};
}

}  // namespace
}  // namespace vps

STABLE_TORCH_LIBRARY_FRAGMENT(vps, m) {
  m.def(
      "cooperative_decode(Tensor x, Tensor weight, Tensor? bias, Tensor? counted, Tensor? I_in, "
      "Tensor? I_out, Tensor policy, Tensor? entropy, int[] rules, float[] numbers) "
      "-> (Tensor y, Tensor features, Tensor core, Tensor gamma, Tensor t)");
}

STABLE_TORCH_LIBRARY_IMPL(vps, CUDA, m) {
  m.impl("cooperative_decode", TORCH_BOX(&vps::decode));
}
