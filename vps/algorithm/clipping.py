"""The clip of SPEC §4: ``s`` by whose root both factors are divided."""

from __future__ import annotations

from torch import Tensor

from vps.algorithm.constants import constant

SQUARINGS = 30


def component_scale(norm_A: Tensor, norm_B: Tensor, tau: float) -> Tensor:
    """``s_c = max(1, ‖A_c‖‖B_c‖/τ)`` from column norms ``[G, r]``."""
    return (norm_A * norm_B).div_(constant(tau, norm_A)).clamp_(min=1)


def spectral_scale(gram_A: Tensor, gram_B: Tensor, tau: float) -> Tensor:
    """``s = max(1, ‖ABᵀ‖₂/τ)`` from Gram matrices ``[G, r, r]``; ``[G, 1]``.

    ``‖ABᵀ‖₂² = λ_max(AᵀA · BᵀB)``, taken as a ratio of traces of powers, which unlike an
    eigenvalue routine never waits for the device.
    """
    product = gram_A @ gram_B
    power = product
    for _ in range(SQUARINGS):
        power = power / power.abs().amax((-2, -1), keepdim=True).clamp_(min=1e-300)
        power = power @ power
    trace = power.diagonal(dim1=-2, dim2=-1).sum(-1)
    eigenvalue = (product * power.mT).sum((-2, -1)) / trace
    norm = eigenvalue.clamp(min=0).nan_to_num(0.0).sqrt()
    return (norm / tau).clamp_(min=1).unsqueeze(-1)
