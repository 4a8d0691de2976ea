"""Build the r × r core ``C`` of an update from policy, SC, clip and second order.

``y = H + b + γ · clamp(H[:, I_out] C Bᵀ)`` (SPEC §3–§5). The core is made from nothing of a layer
but its :class:`vps.algorithm.weight.Products`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vps.algorithm import policy, selection
from vps.algorithm.policy import Settings
from vps.algorithm.weight import Products
from vps.constants import constant

SQUARINGS = 30


class Core(NamedTuple):
    """What is decided for G groups.

    Args:
        matrix: ``C`` without γ, a diagonal ``[G, 1, r]`` or ``[G, r, r]``; 0 in inactive columns.
        gamma: ``[G]``, 0 for a group without a counted token.
        inactive: the columns left out, bool ``[G, r]``; ``None`` where all take part.
    """

    matrix: Tensor
    gamma: Tensor
    inactive: Tensor | None


def build(
    products: Products,
    numbers: Tensor,
    energy: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
) -> Core:
    """Decide γ and the active columns of every group, and build the core.

    Args:
        products: products of the whole layer.
        numbers: float64 ``[9]`` as :func:`vps.algorithm.policy.bounds` returns them, or ``[9 + r]``
            with a factor for each column.
        energy: ``[G]``; ``None`` when nothing is adaptive.
        entropy: ℋ in nats, or −1 where none is set, and the factor of the history, float64
            ``[2]`` (:meth:`PolicyState.signals`); ``None`` for neither.
        mask: bool ``[G, T]``, True counts; ``None`` when all count.
        settings: the settings of the layer.
    """
    # In float64 like the policy: float32 would round a σ near 1 up to the next rank.
    wide = None if energy is None else energy.to(numbers.dtype, copy=True)
    groups = products.t.shape[0]
    decision = policy.decide(numbers, wide, entropy, groups, settings)
    numbers = numbers.to(selection.accumulation_dtype(products.t.dtype))
    gamma, inactive = decision.gamma.to(numbers.dtype), decision.inactive
    decision = policy.Decision(gamma, inactive, decision.second_order)
    mixing = None
    if settings.coupled:
        assert products.X_A is not None
        X_A, Y = (selection.clean(values, mask) for values in (products.X_A, products.t))
        mixing = selection.coupling(X_A, Y, inactive, settings.alpha)
    columns = numbers[policy.NUMBERS :] if len(numbers) > policy.NUMBERS else None
    matrix = _matrix(products, mixing, decision, columns, settings)
    if inactive is not None:
        matrix = matrix.masked_fill(inactive.unsqueeze(1), 0.0)
    if mask is not None:
        gamma = gamma.masked_fill(~mask.any(1), 0.0)
    return Core(matrix, gamma, inactive)


def _matrix(
    products: Products,
    mixing: Tensor | None,
    decision: policy.Decision,
    columns: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Return ``C``: a diagonal ``[G, 1, r]`` for SK of order 1, else ``[G, r, r]``.

    ``C = V D (I + γ/2 w Mᵀ) D w`` with ``M = D Vᵀ B[I_out] D``, which order 1 takes as 0. Here
    ``D`` is ``diag(1/√s)``, and ``w`` ``[r]`` holds the factors of the columns, 1 by default.
    """
    groups, r = products.t.shape[0], products.t.shape[-1]
    dtype, device = decision.gamma.dtype, decision.gamma.device
    scale = constant(1.0, decision.gamma).expand(groups, r)
    if settings.tau is not None:
        scale = _clip(products, mixing, decision.inactive, settings, settings.tau)
    if mixing is None and decision.second_order is None:
        inverse = scale.reciprocal() if columns is None else columns / scale
        return inverse.expand(groups, r).unsqueeze(1)
    V = torch.eye(r, dtype=dtype, device=device) if mixing is None else mixing.to(dtype)
    V = V.expand(groups, r, r)
    if decision.second_order is None:
        return V / scale.unsqueeze(1) if columns is None else V * (columns / scale).unsqueeze(1)
    D = scale.expand(groups, r).rsqrt().unsqueeze(1)  # scales columns
    M = D.mT * (V.mT @ _given(products.B_selected)) * D
    if decision.inactive is not None:
        M = M.masked_fill(decision.inactive.unsqueeze(1) | decision.inactive.unsqueeze(2), 0.0)
    half = M.mT * (decision.gamma * decision.second_order / 2).view(-1, 1, 1)
    D_out = D
    if columns is not None:
        half, D_out = half * columns.unsqueeze(-1), D * columns
    return (V * D) @ (torch.eye(r, dtype=dtype, device=device) + half) * D_out


def _clip(
    products: Products,
    mixing: Tensor | None,
    inactive: Tensor | None,
    settings: Settings,
    tau: float,
) -> Tensor:
    """Return ``s`` of SPEC §4, ``[G, r]`` or ``[G, 1]``, from norms and Gram matrices alone."""
    component = settings.clip == "component"
    if mixing is None and component:
        return component_scale(_given(products.norm_A), _given(products.norm_B), tau)
    gram_A = _given(products.gram_A)
    if mixing is not None:
        mixing = mixing.to(gram_A.dtype)
        gram_A = mixing.mT @ gram_A @ mixing
    if component:
        norm_A = gram_A.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        return component_scale(norm_A, _given(products.norm_B), tau)
    if inactive is not None:
        gram_A = gram_A.masked_fill(inactive.unsqueeze(1) | inactive.unsqueeze(2), 0.0)
    return spectral_scale(gram_A, _given(products.gram_B), tau)


def component_scale(norm_A: Tensor, norm_B: Tensor, tau: float) -> Tensor:
    """Return ``s_c = max(1, ‖A_c‖‖B_c‖/τ)`` from column norms ``[G, r]``."""
    return (norm_A * norm_B).div_(constant(tau, norm_A)).clamp_(min=1)


def spectral_scale(gram_A: Tensor, gram_B: Tensor, tau: float) -> Tensor:
    """Return ``s = max(1, ‖ABᵀ‖₂/τ)`` ``[G, 1]`` from Gram matrices ``[G, r, r]``.

    ``‖ABᵀ‖₂² = λ_max(AᵀA · BᵀB)`` is taken as a ratio of traces of powers. An eigenvalue routine
    would wait for the device.
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


def square(matrix: Tensor) -> Tensor:
    """Return a core as ``[G, r, r]``, also if it is given as its diagonal ``[G, 1, r]``."""
    return matrix if matrix.shape[1] == matrix.shape[2] else matrix.squeeze(1).diag_embed()


def _given(numbers: Tensor | None) -> Tensor:
    assert numbers is not None
    return numbers
