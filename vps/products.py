"""The r × r core ``C`` from inner products of the factors' columns (SPEC §4 and §5).

Policy, SC coupling, clip and second order need of W no more than these products, so that whoever
holds W in another form, or a part of it, can bring them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vps import clipping, policy, selection
from vps.constants import constant
from vps.policy import Settings


class Products(NamedTuple):
    """What the core is made of; ``None`` where the settings do not ask for it.

    Args:
        t: ``H[:, I_out]``, ``[G, T, r]``, a tensor of its own.
        X_A: ``x[:, I_in]``, ``[G, T, r]``, for SC.
        norm_A: ``‖W[I_out[c]]‖``, ``[G, r]``, for the component clip of SK.
        gram_A: inner products of the rows I_out of W, ``[G, r, r]``, for the other clips.
        norm_B: ``‖W[:, I_in[c]]‖``, ``[G, r]``, for the component clip.
        gram_B: inner products of the columns I_in of W, ``[G, r, r]``, for the spectral clip.
        B_selected: ``W[I_out, I_in]``, ``[G, r, r]``, for the second order.
    """

    t: Tensor
    X_A: Tensor | None = None
    norm_A: Tensor | None = None
    gram_A: Tensor | None = None
    norm_B: Tensor | None = None
    gram_B: Tensor | None = None
    B_selected: Tensor | None = None


def needs_gram_of_rows(settings: Settings) -> bool:
    """Whether the clip needs ``gram_A`` instead of ``norm_A``."""
    return settings.tau is not None and (settings.coupled or settings.spectral)


def build_core(
    products: Products,
    numbers: Tensor,
    energy: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(core, γ, t)`` and the columns left out, bool ``[G, r]`` or ``None``.

    Args:
        products: the rest of the layer; ``t`` is overwritten.
        numbers: of :func:`vps.policy.bounds`, ``[9]``.
        energy: ``[G]``, overwritten; ``None`` when nothing is adaptive.
        entropy: ℋ in nats, one element, or ``None``.
        mask: bool ``[G, T]``, True counts; ``None`` when all do.
        settings: the rest.

    Returns:
        ``C`` without γ, a diagonal ``[G, 1, r]`` or ``[G, r, r]``; γ ``[G]``; ``t``, 0 in columns
        left out; those columns.
    """
    t = products.t
    numbers = numbers.to(selection.accumulation_dtype(t.dtype))
    decision = policy.decide(numbers, energy, entropy, len(t), settings)
    gamma, inactive = decision.gamma, decision.inactive
    mixing = None
    if products.X_A is not None:
        X_A, Y = (selection.clean(z, mask) for z in (products.X_A, t))
        mixing = selection.coupling(X_A, Y, inactive, settings.alpha)
    core = _core(products, mixing, decision, settings)
    if inactive is not None:
        t.masked_fill_(inactive.unsqueeze(1), 0.0)
        core = core.masked_fill(inactive.unsqueeze(1), 0.0)
    if mask is not None:
        gamma = gamma.masked_fill(~mask.any(1), 0.0)
    return core, gamma, t, inactive


def _core(
    products: Products, mixing: Tensor | None, decision: policy.Decision, settings: Settings
) -> Tensor:
    """``C`` without γ: a diagonal ``[G, 1, r]`` for SK of order 1, else ``[G, r, r]``.

    With ``D = diag(1/√s)``: ``C = V D (I + γ/2 Mᵀ) D``, ``M = D Vᵀ B[I_out] D`` for order 2.
    """
    groups, _, r = products.t.shape
    dtype = selection.accumulation_dtype(products.t.dtype)
    scale = constant(1.0, decision.gamma).expand(groups, r)
    if settings.tau is not None:
        scale = _clip(products, mixing, decision.inactive, settings, settings.tau)
    if mixing is None and decision.second_order is None:
        return scale.reciprocal().expand(groups, r).unsqueeze(1)
    one = torch.eye(r, dtype=dtype, device=products.t.device)
    V = (one if mixing is None else mixing.to(dtype)).expand(groups, r, r)
    if decision.second_order is None:
        return V / scale.unsqueeze(1)
    assert products.B_selected is not None
    D = scale.expand(groups, r).rsqrt().unsqueeze(1)  # scales columns
    M = D.mT * (V.mT @ products.B_selected) * D
    if decision.inactive is not None:
        M = M.masked_fill(decision.inactive.unsqueeze(1) | decision.inactive.unsqueeze(2), 0.0)
    half = M.mT * (decision.gamma * decision.second_order / 2).view(-1, 1, 1)
    return (V * D) @ (one + half) * D


def _clip(
    products: Products,
    mixing: Tensor | None,
    inactive: Tensor | None,
    settings: Settings,
    tau: float,
) -> Tensor:
    """``s`` of SPEC §4, ``[G, r]`` or ``[G, 1]``."""
    gram_A = products.gram_A
    if gram_A is None:
        assert products.norm_A is not None and products.norm_B is not None
        return clipping.component_scale(products.norm_A, products.norm_B, tau)
    if mixing is not None:
        mixing = mixing.to(gram_A.dtype)
        gram_A = mixing.mT @ gram_A @ mixing
    if not settings.spectral:
        assert products.norm_B is not None
        norm_A = gram_A.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        return clipping.component_scale(norm_A, products.norm_B, tau)
    assert products.gram_B is not None
    if inactive is not None:
        gram_A = gram_A.masked_fill(inactive.unsqueeze(1) | inactive.unsqueeze(2), 0.0)
    return clipping.spectral_scale(gram_A, products.gram_B, tau)
