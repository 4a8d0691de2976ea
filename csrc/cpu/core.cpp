#include "core.h"

#include <algorithm>
#include <cmath>

namespace vps {
namespace {

constexpr int kSweeps = 30;

/// Solves A Z = R in place of R, [n, n] and [n, m]: Gaussian elimination with partial pivoting.
void solve(double* A, double* R, int64_t n, int64_t m) {
  for (int64_t k = 0; k < n; ++k) {
    int64_t pivot = k;
    for (int64_t i = k + 1; i < n; ++i)
      if (std::fabs(A[i * n + k]) > std::fabs(A[pivot * n + k])) pivot = i;
    if (pivot != k) {
      std::swap_ranges(A + k * n, A + (k + 1) * n, A + pivot * n);
      std::swap_ranges(R + k * m, R + (k + 1) * m, R + pivot * m);
    }
    for (int64_t i = k + 1; i < n; ++i) {
      const double ratio = A[i * n + k] / A[k * n + k];
      for (int64_t j = k + 1; j < n; ++j) A[i * n + j] -= ratio * A[k * n + j];
      for (int64_t j = 0; j < m; ++j) R[i * m + j] -= ratio * R[k * m + j];
    }
  }
  for (int64_t k = n - 1; k >= 0; --k)
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t i = k + 1; i < n; ++i) R[k * m + j] -= A[k * n + i] * R[i * m + j];
      R[k * m + j] /= A[k * n + k];
    }
}

/// Jacobi's rotations: the diagonal of A [n, n] becomes its eigenvalues; columns of Q (if not null)
/// its eigenvectors.
void eigen(double* A, double* Q, int64_t n) {
  if (Q) {
    std::fill(Q, Q + n * n, 0.0);
    for (int64_t i = 0; i < n; ++i) Q[i * n + i] = 1;
  }
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    bool rotated = false;
    for (int64_t p = 0; p < n; ++p)
      for (int64_t q = p + 1; q < n; ++q) {
        const double a = A[p * n + q];
        if (!(std::fabs(a) > 1e-17 * std::sqrt(std::fabs(A[p * n + p] * A[q * n + q])))) continue;
        rotated = true;
        const double theta = (A[q * n + q] - A[p * n + p]) / (2 * a);
        // A θ whose square overflows gives t = 0; std::hypot would ask for glibc 2.35.
        const double t =
            std::copysign(1.0, theta) / (std::fabs(theta) + std::sqrt(theta * theta + 1.0));
        const double c = 1 / std::sqrt(t * t + 1.0), s = t * c;
        const auto rotate = [c, s](double& u, double& v) {
          const double old = u;
          u = c * old - s * v;
          v = s * old + c * v;
        };
        for (int64_t i = 0; i < n; ++i) rotate(A[i * n + p], A[i * n + q]);
        for (int64_t i = 0; i < n; ++i) rotate(A[p * n + i], A[q * n + i]);
        if (Q)
          for (int64_t i = 0; i < n; ++i) rotate(Q[i * n + p], Q[i * n + q]);
      }
    if (!rotated) return;
  }
}

/// Z = A B or, with `transposed`, A Bᵀ; all [n, n].
void multiply(const double* A, const double* B, int64_t n, double* Z, bool transposed = false) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double total = 0;
      for (int64_t k = 0; k < n; ++k)
        total += A[i * n + k] * (transposed ? B[j * n + k] : B[k * n + j]);
      Z[i * n + j] = total;
    }
}

}  // namespace

int64_t couple_work(int64_t a) { return 2 * a * a; }

void couple(const double* X, const double* Y, int64_t n, int64_t a, double alpha, double* T,
            double* work) {
  double* gram = work;
  double* right = work + a * a;
  const bool few = n < a;  // only α keeps XᵀX from being singular then
  const int64_t size = few ? n : a;
  std::fill(gram, gram + size * size, 0.0);
  if (few) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        for (int64_t c = 0; c < a; ++c) gram[i * n + j] += X[i * a + c] * X[j * a + c];
    std::copy(Y, Y + n * a, right);
  } else {
    std::fill(right, right + a * a, 0.0);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < a; ++c) {
        const double x = X[i * a + c];
        for (int64_t j = 0; j < a; ++j) gram[c * a + j] += x * X[i * a + j];
        for (int64_t j = 0; j < a; ++j) right[c * a + j] += x * Y[i * a + j];
      }
  }
  for (int64_t i = 0; i < size; ++i) gram[i * size + i] += alpha;
  solve(gram, right, size, a);
  if (few) {
    std::fill(T, T + a * a, 0.0);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < a; ++c)
        for (int64_t j = 0; j < a; ++j) T[c * a + j] += X[i * a + c] * right[i * a + j];
  } else {
    std::copy(right, right + a * a, T);
  }
  for (int64_t c = 0; c < a; ++c) {
    double largest = 0, total = 0;
    for (int64_t j = 0; j < a; ++j) largest = std::max(largest, std::fabs(T[c * a + j]));
    if (largest == 0) continue;
    for (int64_t j = 0; j < a; ++j) total += std::pow(T[c * a + j] / largest, 2);
    const double norm = largest * std::sqrt(total);
    for (int64_t j = 0; j < a; ++j) T[c * a + j] /= norm;
  }
}

void mix_gram(const double* T, int64_t a, double* G, double* work) {
  multiply(T, G, a, work);
  multiply(work, T, a, G, true);
}

double spectral_norm(double* P, double* Q, int64_t a, double* work) {
  double* vectors = work;
  double* root = work + a * a;
  eigen(Q, vectors, a);
  for (int64_t i = 0; i < a; ++i)  // root rootᵀ = Q
    for (int64_t k = 0; k < a; ++k)
      root[k * a + i] = vectors[k * a + i] * std::sqrt(std::max(0.0, Q[i * a + i]));
  multiply(P, root, a, vectors);
  std::fill(Q, Q + a * a, 0.0);  // rootᵀ P root has the eigenvalues of P Q
  for (int64_t k = 0; k < a; ++k)
    for (int64_t i = 0; i < a; ++i)
      for (int64_t j = 0; j < a; ++j) Q[i * a + j] += root[k * a + i] * vectors[k * a + j];
  eigen(Q, nullptr, a);
  double largest = 0;
  for (int64_t i = 0; i < a; ++i) largest = std::max(largest, Q[i * a + i]);
  return std::sqrt(largest);
}

void build_core(const double* T, const double* scale, const double* B_selected,
                const double* columns, double gamma, int64_t a, double* C, double* work) {
  // In C: V D² w without, V D (I + γ/2 w Mᵀ) D w with the second order.
  const auto w = [&](int64_t c) { return columns ? columns[c] : 1.0; };
  const auto V = [&](int64_t j, int64_t c) { return T ? T[c * a + j] : (j == c ? 1.0 : 0.0); };
  if (!B_selected) {
    for (int64_t j = 0; j < a; ++j)
      for (int64_t c = 0; c < a; ++c) C[j * a + c] = V(j, c) * w(c) / scale[c];
    return;
  }
  for (int64_t i = 0; i < a; ++i)  // work = I + γ/2 w Mᵀ, M[c, i] = D_c (Vᵀ B)[c, i] D_i
    for (int64_t c = 0; c < a; ++c) {
      double total = 0;
      for (int64_t j = 0; j < a; ++j) total += V(j, c) * B_selected[j * a + i];
      work[i * a + c] = (i == c) + gamma / 2 * w(i) * total / std::sqrt(scale[c] * scale[i]);
    }
  for (int64_t j = 0; j < a; ++j)
    for (int64_t i = 0; i < a; ++i) {
      double total = 0;
      for (int64_t c = 0; c < a; ++c) total += V(j, c) / std::sqrt(scale[c]) * work[c * a + i];
      C[j * a + i] = total * w(i) / std::sqrt(scale[i]);
    }
}

}  // namespace vps
