// The r × r core of the update of a group, in double.
#pragma once

#include <cstdint>

namespace vps {

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
