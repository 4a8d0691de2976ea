// The choices of a layer that shape the code, read from what Settings.packed() of
// vps/algorithm/policy.py makes of them: the one place that knows their order.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace vps {

using Rules = std::vector<int64_t>;
using Numbers = std::vector<double>;

struct Settings {
  int64_t r;                                     // columns of the selection
  bool adaptive, coupled, second_order, spectral;
  double alpha;                                  // ridge of SC
  std::optional<double> tau, clamp;              // bounds of the clip and of δ

  Settings(const Rules& rules, const Numbers& numbers) {
    if (rules.size() != 7 || numbers.size() != 3)
      throw std::invalid_argument(
          "vps: rules must hold 7 integers and numbers 3, as Settings.packed() returns them, got " +
          std::to_string(rules.size()) + " and " + std::to_string(numbers.size()));
    r = rules[0];
    adaptive = rules[1];
    coupled = rules[2];
    second_order = rules[3];
    spectral = rules[4];
    alpha = numbers[0];
    if (rules[5]) tau = numbers[1];
    if (rules[6]) clamp = numbers[2];
  }
};

}  // namespace vps
