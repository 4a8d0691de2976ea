// The loops for any processor: eight floats for the compiler to vectorize as the baseline allows.
#include <cstdint>
#include <cstring>

#include "element.h"
#include "kernels.h"

namespace vps::generic {

struct Vec {
  static constexpr int64_t width = 8;
  static constexpr int registers = 16;
  float lane[width];
};

template <class F>
inline Vec map(F f) {
  Vec out;
  for (int64_t i = 0; i < Vec::width; ++i) out.lane[i] = f(i);
  return out;
}

inline Vec broadcast(float value) {
  return map([&](int64_t) { return value; });
}

template <class T>
inline Vec load(const T* p) {
  return map([&](int64_t i) { return static_cast<float>(p[i]); });
}

template <class T>
inline void store(T* p, Vec v) {
  for (int64_t i = 0; i < Vec::width; ++i) p[i] = static_cast<T>(v.lane[i]);
}

inline Vec add(Vec a, Vec b) {
  return map([&](int64_t i) { return a.lane[i] + b.lane[i]; });
}

inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return map([&](int64_t i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}

/// Adds |v| and v² where v is finite.
inline void add_magnitude(Vec v, Vec& total, Vec& squares) {
  for (int64_t i = 0; i < Vec::width; ++i) {
    const float all = v.lane[i] < 0 ? -v.lane[i] : v.lane[i];
    const float size = all <= 0x1.fffffep127f ? all : 0.0f;
    total.lane[i] += size;
    squares.lane[i] += size * size;
  }
}

/// v within [-limit, limit]; NaN stays NaN.
inline Vec clamp(Vec v, Vec limit) {
  return map([&](int64_t i) {
    const float low = v.lane[i] < -limit.lane[i] ? -limit.lane[i] : v.lane[i];
    return low > limit.lane[i] ? limit.lane[i] : low;
  });
}

inline bool any_greater(Vec a, Vec b) {
  bool any = false;
  for (int64_t i = 0; i < Vec::width; ++i) any |= a.lane[i] > b.lane[i];
  return any;
}

inline float sum(Vec v) {
  const float* a = v.lane;
  return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}

}  // namespace vps::generic

#define VPS_VARIANT generic
#include "variant.inc"
