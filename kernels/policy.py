"""Decide by the adaptive policy and clip components on the device (SPEC §4, §5)."""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def interpolate_integer(low, high, sigma):
    """Return ``lo + ⌊(hi − lo)σ + 2⁻²⁰⌋``."""
    return (low + tl.floor((high - low) * sigma + 0.00000095367431640625)).to(tl.int32)


@triton.jit
def load_policy(policy_ptr, entropy_ptr):
    """Load a factor, the bounds of γ, rank and topk, then ℋ and the factor of the history.

    The last two are 0 without ``entropy_ptr``.
    """
    factor = tl.load(policy_ptr)
    entropy, history = factor * 0.0, factor * 0.0
    if entropy_ptr is not None:
        entropy, history = tl.load(entropy_ptr).to(tl.float64), tl.load(entropy_ptr + 1)
    bounds_of_gamma = tl.load(policy_ptr + 1), tl.load(policy_ptr + 2)
    bounds_of_rank = tl.load(policy_ptr + 3), tl.load(policy_ptr + 4)
    bounds_of_topk = tl.load(policy_ptr + 5), tl.load(policy_ptr + 6)
    return factor, bounds_of_gamma, bounds_of_rank, bounds_of_topk, entropy, history


@triton.jit
def strength(
    factor,
    energy,  # of this group, or None when nothing is adaptive
    entropy,
    history,
    HAS_ENTROPY: tl.constexpr,
):
    """Return σ of one group in float64, 0 when nothing is adaptive."""
    sigma = factor * 0.0
    if energy is not None:
        sigma = 1.0 - tl.exp(-energy.to(tl.float64))
        if HAS_ENTROPY:
            sigma = tl.maximum(sigma, tl.minimum(entropy / 3.0, 1.0))
            factor *= history
        sigma = tl.minimum(factor * sigma, 1.0)
    return sigma


@triton.jit
def decide_by(
    policy,  # of load_policy
    energy,  # of this group, or None when nothing is adaptive
    HAS_ENTROPY: tl.constexpr,
    R: tl.constexpr,
):
    """Return γ in float64 and the number of active columns of one group."""
    factor, of_gamma, of_rank, of_topk, entropy, history = policy
    sigma = strength(factor, energy, entropy, history, HAS_ENTROPY)
    gamma = of_gamma[0] + (of_gamma[1] - of_gamma[0]) * sigma
    rank = interpolate_integer(of_rank[0], of_rank[1], sigma)
    pool = interpolate_integer(of_topk[0], of_topk[1], sigma)
    return gamma, tl.minimum(tl.minimum(rank, pool), R)


@triton.jit
def is_second_order(policy_ptr, energy, entropy_ptr):
    """Return whether one group takes the second-order term; arguments as of :func:`decide`."""
    HAS_ENTROPY: tl.constexpr = entropy_ptr is not None
    factor, _, _, _, entropy, history = load_policy(policy_ptr, entropy_ptr)
    sigma = strength(factor, energy, entropy, history, HAS_ENTROPY)
    return interpolate_integer(tl.load(policy_ptr + 7), tl.load(policy_ptr + 8), sigma) >= 2


@triton.jit
def decide(
    policy_ptr,  # float64 [9 ...]: a factor, bounds of γ, rank, topk, order
    energy,  # of this group, or None when nothing is adaptive
    entropy_ptr,  # [2] ℋ or −1, and the factor of the history; or None
    R: tl.constexpr,
):
    """Return γ in float64 and the number of active columns of one group."""
    HAS_ENTROPY: tl.constexpr = entropy_ptr is not None
    return decide_by(load_policy(policy_ptr, entropy_ptr), energy, HAS_ENTROPY, R)


@triton.jit
def column_factors(policy_ptr, rank, inside, ACC: tl.constexpr):
    """Load the factor of each column at ``rank`` [R], behind the policy's nine numbers."""
    return tl.load(policy_ptr + 9 + rank, mask=inside, other=0.0).to(ACC)


@triton.jit
def inverse_scale(squares_A, squares_B, TAU: tl.constexpr):
    """Return ``1/s_c`` with ``s_c = max(1, ‖A_c‖‖B_c‖/τ)``, NaN where a norm is."""
    scale = tl.sqrt(squares_A) * tl.sqrt(squares_B) / TAU
    return 1.0 / tl.where(scale <= 1.0, 1.0, scale)
