// What the policy decides for a group of tokens from its energy (SPEC §5), for C++ and CUDA.
#pragma once

#include <math.h>

#include <cstdint>

#if defined(__CUDACC__)
#define VPS_HOST_DEVICE __host__ __device__
#else
#define VPS_HOST_DEVICE
#endif

namespace vps {

/// The first nine numbers of the policy tensor: bounds are inclusive, equal for a fixed setting.
struct Policy {
  static constexpr int kCount = 9;
  double factor;
  double gamma[2], rank[2], topk[2], order[2];
};

struct Decision {
  double gamma;
  int64_t active;  // columns in use, the first ones
  bool second_order;
};

/// The integer between `bounds` that sigma chooses, from 0 to `limit`.
VPS_HOST_DEVICE inline int64_t chosen(const double bounds[2], double sigma, int64_t limit) {
  constexpr double kFloorGuard = 0x1p-20;
  const double steps = floor((bounds[1] - bounds[0]) * sigma + kFloorGuard);
  return static_cast<int64_t>(fmin(fmax(bounds[0] + fmax(steps, 0.0), 0.0),
                                   static_cast<double>(limit)));
}

/// `entropy` may be null; `energy` is 0 where nothing is adaptive.
VPS_HOST_DEVICE inline Decision decide(const Policy& policy, const double* entropy, double energy,
                                       int64_t r, bool second_order) {
  double sigma = -expm1(-energy);
  if (entropy) sigma = fmax(sigma, fmin(1.0, *entropy / 3));
  sigma = fmin(1.0, policy.factor * sigma);
  const int64_t rank = chosen(policy.rank, sigma, r), pool = chosen(policy.topk, sigma, r);
  return {policy.gamma[0] + (policy.gamma[1] - policy.gamma[0]) * sigma, rank < pool ? rank : pool,
          second_order && chosen(policy.order, sigma, 2) == 2};
}

}  // namespace vps
