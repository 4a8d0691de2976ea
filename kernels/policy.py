"""Decide by the adaptive policy and clip components on the device (SPEC §4, §5)."""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def interpolate_integer(policy_ptr, at: tl.constexpr, sigma):
    """Return ``lo + ⌊(hi − lo)σ + 2⁻²⁰⌋`` of the setting whose bounds stand at ``at``."""
    low = tl.load(policy_ptr + at)
    high = tl.load(policy_ptr + at + 1)
    return (low + tl.floor((high - low) * sigma + 0.00000095367431640625)).to(tl.int32)


@triton.jit
def strength(
    policy_ptr,  # float64 [9 ...]: a factor, bounds of γ, rank, topk, order
    energy,  # of this group, or None when nothing is adaptive
    entropy_ptr,  # [2] ℋ or −1, and the factor of the history; or None
):
    """Return σ of one group in float64, 0 when nothing is adaptive."""
    factor = tl.load(policy_ptr)
    sigma = factor * 0.0
    if energy is not None:
        sigma = 1.0 - tl.exp(-energy.to(tl.float64))
        if entropy_ptr is not None:
            sigma = tl.maximum(sigma, tl.minimum(tl.load(entropy_ptr).to(tl.float64) / 3.0, 1.0))
            factor *= tl.load(entropy_ptr + 1)
        sigma = tl.minimum(factor * sigma, 1.0)
    return sigma


@triton.jit
def is_second_order(policy_ptr, energy, entropy_ptr):
    """Return whether one group takes the second-order term; arguments as of :func:`decide`."""
    return interpolate_integer(policy_ptr, 7, strength(policy_ptr, energy, entropy_ptr)) >= 2


@triton.jit
def decide(
    policy_ptr,  # float64 [9 ...]: a factor, bounds of γ, rank, topk, order
    energy,  # of this group, or None when nothing is adaptive
    entropy_ptr,  # [2] ℋ or −1, and the factor of the history; or None
    R: tl.constexpr,
):
    """Return γ in float64 and the number of active columns of one group."""
    sigma = strength(policy_ptr, energy, entropy_ptr)
    low = tl.load(policy_ptr + 1)
    gamma = low + (tl.load(policy_ptr + 2) - low) * sigma
    rank = interpolate_integer(policy_ptr, 3, sigma)
    pool = interpolate_integer(policy_ptr, 5, sigma)
    return gamma, tl.minimum(tl.minimum(rank, pool), R)


@triton.jit
def column_factors(policy_ptr, rank, inside, ACC: tl.constexpr):
    """Load the factor of each column at ``rank`` [R], behind the policy's nine numbers."""
    return tl.load(policy_ptr + 9 + rank, mask=inside, other=0.0).to(ACC)


@triton.jit
def inverse_scale(squares_A, squares_B, TAU: tl.constexpr):
    """Return ``1/s_c`` with ``s_c = max(1, ‖A_c‖‖B_c‖/τ)``, NaN where a norm is."""
    scale = tl.sqrt(squares_A) * tl.sqrt(squares_B) / TAU
    return 1.0 / tl.where(scale <= 1.0, 1.0, scale)
