"""A sharpened layer that can be differentiated by its γ, with the selection held (SPEC §6).

``∂L/∂γ = Σ g ∘ clamp(δ)`` and ``∂L/∂C = γ · tᵀ((g ∘ mask) B)``, from ``t = H[:, I_out]`` ``[N, r]``
and ``g B`` ``[N, r]``: no δ is kept. What the core owes to γ, its columns and its second order, is
left to autograd, which sees r × r numbers. Tokens that select alike share the columns of W.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vps.algorithm import clipping, gradient, policy, torch_backend
from vps.algorithm.policy import NUMBERS, Settings
from vps.algorithm.selection import accumulation_dtype
from vps.algorithm.torch_backend import Inputs

Norms = tuple[Tensor, Tensor]  # of the rows [d_out] and columns [d_in] of W


class Selection(NamedTuple):
    """What a layer chose: base product ``[G, T, d_out]``, energy ``[G]`` (or ``None`` where nothing
    is adaptive), ``I_in`` and ``I_out`` ``[G, r]``."""

    H: Tensor
    energy: Tensor | None
    I_in: Tensor
    I_out: Tensor


def norms(weight: Tensor) -> Norms:
    """Of the rows and columns of W, which is frozen, in the accumulation dtype."""
    dtype = accumulation_dtype(weight.dtype)
    rows, columns = (torch.linalg.vector_norm(weight, 2, dim=d, dtype=dtype) for d in (1, 0))
    return rows, columns


def sharpened(
    inputs: Inputs, chosen: Selection, gamma: Tensor, settings: Settings, weight_norms: Norms
) -> Tensor:
    """Output ``[G, T, d_out]``, differentiable by x and γ.

    Args:
        inputs: of the layer; its policy ``[9]`` is that of the config.
        chosen: constants here.
        gamma: float64 without dims, or ``[r]`` for one a column.
        settings: the rest.
        weight_norms: of :func:`norms`.
    """
    given = inputs.policy
    if gamma.dim():
        numbers = torch.cat([given[:1], given.new_ones(2), given[3:NUMBERS], gamma])
    else:
        numbers = torch.cat([given[:1], gamma.expand(2), given[3:NUMBERS]])
    H, energy, I_in, I_out = chosen
    W, mask = inputs.weight, inputs.mask
    if settings.coupled or settings.second_order or settings.spectral:
        fixed = inputs._replace(x=inputs.x.detach(), policy=numbers)
        B = gradient.columns(W, I_in) if gradient.reads_columns(W, I_in) else None
        core, scale, t, _ = torch_backend.build(fixed, H, energy, I_in, I_out, B, settings)
    else:  # as build has it, with norms that are known
        wide = numbers.to(weight_norms[0].dtype)
        decision = policy.decide(wide, energy, inputs.entropy, len(H), settings)
        core = wide.new_ones(I_in.shape)
        if settings.tau is not None:
            pair = weight_norms[0][I_out], weight_norms[1][I_in]
            core = clipping.component_scale(*pair, settings.tau).reciprocal()
        if gamma.dim():
            core = core * wide[NUMBERS:]
        t = torch_backend.selected(H, I_out)
        if decision.inactive is not None:
            core = core.masked_fill(decision.inactive, 0.0)
            t = t.masked_fill(decision.inactive.unsqueeze(1), 0.0)
        core, scale = core.unsqueeze(1), decision.gamma
        if mask is not None:
            scale = scale.masked_fill(~mask.any(1), 0.0)
    y: Tensor = _Update.apply(inputs.x, core, scale, H, t, W, I_in, I_out, settings.clamp)
    return y if inputs.bias is None else y + inputs.bias


class _Update(torch.autograd.Function):
    """``H + γ · clamp(t C Bᵀ)`` by x, C and γ; H, t and B are what x and W make of them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        core: Tensor,
        gamma: Tensor,
        H: Tensor,
        t: Tensor,
        weight: Tensor,
        I_in: Tensor,
        I_out: Tensor,
        clamp: float | None,
    ) -> Tensor:
        ctx.clamp = clamp
        ctx.save_for_backward(core, gamma, t, weight, I_in, I_out)
        factor = gamma.view(-1, 1, 1)
        columns = _Columns(weight, I_in)
        if clamp is None:
            return H + columns.expand(gradient.mix(t, core * factor))
        delta = columns.expand(gradient.mix(t, core))
        return H + factor.to(H.dtype) * delta.clamp_(-clamp, clamp)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        core, gamma, t, W, I_in, I_out = ctx.saved_tensors
        columns, clamp = _Columns(W, I_in), ctx.clamp
        diagonal = core.shape[1] == 1
        inside, grad_gamma = g, None
        if clamp is not None:
            delta = columns.expand(gradient.mix(t, core))
            inside = g * (delta.abs() <= clamp)
            grad_gamma = (g * delta.clamp_(-clamp, clamp)).sum((1, 2), dtype=gamma.dtype)
        g_B = columns.contract(inside).to(core.dtype)
        wide, factor = t.to(core.dtype), gamma.view(-1, 1, 1)
        if grad_gamma is None:
            grad_gamma = ((wide * core if diagonal else wide @ core) * g_B).sum((1, 2))
        grad_core = (wide * g_B).sum(1, keepdim=True) if diagonal else wide.mT @ g_B
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_t = gradient.mix(g_B * factor, core if diagonal else core.mT).to(g.dtype)
            grad_x = g.scatter_add(-1, I_out.unsqueeze(1).expand_as(grad_t), grad_t) @ W
        return grad_x, grad_core * factor, grad_gamma, *[None] * 6


class _Columns:
    """``B`` of all groups by its distinct columns: ``[d_out, u]``, and where each is."""

    def __init__(self, weight: Tensor, I_in: Tensor) -> None:
        features, slots = torch.unique(I_in, return_inverse=True)
        self.slots = slots.unsqueeze(1)  # [G, 1, r]
        self.B = weight.index_select(1, features)

    def expand(self, u: Tensor) -> Tensor:
        """``u Bᵀ``: ``[G, T, r]`` to ``[G, T, d_out]``."""
        dense = u.new_zeros(*u.shape[:2], self.B.shape[1])
        dense.scatter_add_(-1, self.slots.expand_as(u), u)
        return (dense.flatten(0, 1) @ self.B.mT).view(*u.shape[:2], -1)

    def contract(self, g: Tensor) -> Tensor:
        """``g B``: ``[G, T, d_out]`` to ``[G, T, r]``."""
        product = (g.flatten(0, 1) @ self.B).view(*g.shape[:2], -1)
        return product.gather(-1, self.slots.expand(-1, g.shape[1], -1))
