// The vectorized loops, compiled once per instruction set and chosen at run time.
#pragma once

#include <cstdint>

namespace vps {

enum class Dtype { float32, bfloat16, float16 };

constexpr int64_t kColumnTile = 512;  // columns whose scores are summed at once
constexpr int64_t kMaxGemvTokens = 8;

/// Loops over elements of one dtype, to which `void` points.
struct Kernels {
  /// scores[j] = sum of |values[i * stride + j]| over the counted rows i, j < width <= kColumnTile.
  /// Non-finite elements count 0; `counted` may be null. Returns the sum of squares.
  double (*column_scores)(const void* values, int64_t rows, int64_t width, int64_t stride,
                          const bool* counted, float* scores);

  /// Sum of a[i] * b[i].
  double (*dot)(const void* a, const void* b, int64_t size);

  /// out[i] = values[i], i < size.
  void (*widen)(const void* values, int64_t size, float* out);

  /// H[n * rows + k] = W[k] . x[n] for k in [begin, end) and tokens n < tokens <= kMaxGemvTokens;
  /// columns[c * rows + k] = W[k, picks[c]] on the way. W has unit stride in its rows.
  void (*gemv)(const void* weight, int64_t stride, int64_t rows, int64_t width, int64_t begin,
               int64_t end, const float* x, int64_t tokens, void* H, const int64_t* picks,
               int64_t n_picks, void* columns);

  /// y[n * stride + k] += bias[k] + gamma * clamp(sum of u[n * u_stride + c] * columns[c][k]),
  /// k in [begin, end). `bias` may be null; no clamp if `clamp` is negative.
  void (*apply)(void* y, int64_t tokens, int64_t stride, int64_t begin, int64_t end, const float* u,
                int64_t u_stride, int64_t active, const void* const* columns, const void* bias,
                float gamma, float clamp);

  /// The r best of scores [size] >= 0, descending, ties to the lower index. `best` [r] is scratch.
  void (*top)(const float* scores, int64_t size, int64_t r, int64_t* features, float* best);
};

/// Those of the best instruction set here, or of the one that VPS_CPP_ISA names.
const Kernels& kernels(Dtype dtype);

const char* instruction_set();

namespace generic {
extern const Kernels table[3];
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table[3];
}
namespace avx512 {
extern const Kernels table[3];
}
#endif

}  // namespace vps
