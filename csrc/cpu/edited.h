// One layer whose update a prompt has fixed (SPEC §11).
#pragma once

#include "arguments.h"

namespace vps {

/// y = W(x + Σ_c e_c u(I_in[c])) + b with e = x Eᵀ, [G, T, d_out].
Tensor edited(const EditedArguments& arguments);

}  // namespace vps
