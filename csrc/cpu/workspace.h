// Scratch memory of one call, and loops over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

namespace vps {

/// Uninitialized arrays, freed together; the first few kilobytes need no allocation.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  template <class T>
  T* take(int64_t count) {
    static_assert(std::is_trivially_destructible_v<T>);
    const size_t bytes = (count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    if (bytes > left_) {
      const size_t size = bytes > kBlock ? bytes : kBlock;
      blocks_.emplace_back(new std::byte[size + kAlign]);
      const auto address = reinterpret_cast<uintptr_t>(blocks_.back().get());
      next_ = blocks_.back().get() + (kAlign - address % kAlign);
      left_ = size;
    }
    T* taken = reinterpret_cast<T*>(next_);
    next_ += bytes;
    left_ -= bytes;
    return taken;
  }

 private:
  static constexpr size_t kAlign = 64;
  static constexpr size_t kBlock = 64 * 1024;  // malloc may map larger ones anew for each call
  alignas(kAlign) std::byte first_[8 * 1024];
  std::byte* next_ = first_;
  size_t left_ = sizeof(first_);
  std::vector<std::unique_ptr<std::byte[]>> blocks_;
};

/// Elements that take no longer than to wake a thread, which between two loops spins for a while
/// unless OMP_WAIT_POLICY sends it to sleep.
inline int64_t serial_work() {
  static const int64_t elements = [] {
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    const bool asleep = policy && (policy[0] == 'p' || policy[0] == 'P');
    return int64_t{1} << (asleep ? 20 : 17);
  }();
  return elements;
}

/// f(begin, end) over parts of [0, count), each item of which costs `work` elements.
template <class F>
void parallel(int64_t count, int64_t work, const F& f) {
  const int64_t grain = std::max<int64_t>(1, serial_work() / std::max<int64_t>(1, work));
  if (count <= grain)
    f(int64_t{0}, count);
  else
    torch::stable::parallel_for(0, count, grain, f);
}

}  // namespace vps
