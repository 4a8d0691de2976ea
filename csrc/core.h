// What the policy decides for a group, and the r × r core of its update, in double.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace vps {

/// Policy [9] (SPEC §5): bounds are inclusive, a fixed setting has both equal.
struct Policy {
  double factor;
  double gamma[2], rank[2], topk[2], order[2];
  std::vector<double> columns;  // w [r], or empty for 1 everywhere
};

struct Decision {
  double gamma;
  int64_t active;  // columns in use, the first ones
  bool second_order;
};

/// SPEC §5 from the energy of a group.
Decision decide(const Policy& policy, std::optional<double> entropy, double energy, int64_t r,
                bool second_order);

/// T [a, a] of SPEC §3 with rows divided by their norms: Ṽ_c = sum of T[c, j] V_j.
/// X, Y [n, a] hold selected inputs and outputs of the counted tokens. `work` [couple_work].
void couple(const double* X, const double* Y, int64_t n, int64_t a, double alpha, double* T,
            double* work);
int64_t couple_work(int64_t a);

/// G := T G Tᵀ, all [a, a]. `work` [a * a].
void mix_gram(const double* T, int64_t a, double* G, double* work);

/// Square root of the largest eigenvalue of P Q, both symmetric and positive semi-definite [a, a]
/// and overwritten. `work` [2 * a * a].
double spectral_norm(double* P, double* Q, int64_t a, double* work);

/// C [a, a] = V D (I + γ/2 w Mᵀ) D w with D = 1/√s, M = D Vᵀ B_selected D, V = Tᵀ or the identity
/// if T is null, w = 1 if `columns` is null; M = 0 if B_selected [a, a], W[I_out, I_in], is null.
/// `work` [a * a].
void build_core(const double* T, const double* scale, const double* B_selected,
                const double* columns, double gamma, int64_t a, double* C, double* work);

}  // namespace vps
