"""A sharpened layer that can be differentiated by its γ, with the selection held (SPEC §6).

``∂L/∂γ = Σ g ∘ clamp(δ)`` and ``∂L/∂C = γ · tᵀ((g ∘ mask) B)``, from ``t = H[:, I_out]`` ``[N, r]``
and ``g B`` ``[N, r]``: no δ is kept. What the core owes to γ, its columns and its second order, is
left to autograd, which sees r × r numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vps import gradient, torch_backend
from vps.policy import NUMBERS, Settings
from vps.torch_backend import Inputs


def sharpened(
    inputs: Inputs,
    H: Tensor,
    I_in: Tensor,
    I_out: Tensor,
    energy: Tensor | None,
    gamma: Tensor,
    settings: Settings,
) -> Tensor:
    """Output ``[G, T, d_out]``, differentiable by x and γ.

    Args:
        inputs: of the layer; its policy ``[9]`` is that of the config.
        H: ``x Wᵀ``, ``[G, T, d_out]``, a constant here.
        I_in, I_out: ``[G, r]``.
        energy: ``[G]``, or ``None`` when nothing is adaptive.
        gamma: float64 without dims, or ``[r]`` for one a column.
        settings: the rest.
    """
    policy = inputs.policy
    if gamma.dim():
        one = policy.new_ones(2)
        numbers = torch.cat([policy[:1], one, policy[3:NUMBERS], gamma])
    else:
        numbers = torch.cat([policy[:1], gamma.expand(2), policy[3:NUMBERS]])
    W = inputs.weight
    fixed = inputs._replace(x=inputs.x.detach(), policy=numbers)
    B = gradient.columns(W, I_in) if gradient.reads_columns(W, I_in) else None
    core, scale, t, _ = torch_backend.build(fixed, H, energy, I_in, I_out, B, settings)
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
        return H + gamma.to(H.dtype).view(-1, 1, 1) * _delta(t, core, weight, I_in, clamp)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        core, gamma, t, W, I_in, I_out = ctx.saved_tensors
        grad_x = grad_core = grad_gamma = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient.of_input(g, W, I_in, I_out, core, gamma, t, ctx.clamp)
        if any(ctx.needs_input_grad[1:3]):
            inside = g
            if ctx.clamp is not None:
                delta = _delta(t, core, W, I_in, None)
                inside = g * (delta.abs() <= ctx.clamp)
                product = g * delta.clamp_(-ctx.clamp, ctx.clamp)
                grad_gamma = product.sum((1, 2), dtype=gamma.dtype)
            g_B = gradient.contract(inside, W, I_in).to(core.dtype)
            wide = t.to(core.dtype)
            if grad_gamma is None:
                u = wide * core if core.shape[1] == 1 else wide @ core
                grad_gamma = (u * g_B).sum((1, 2))
            if core.shape[1] == 1:
                grad_core = (wide * g_B).sum(1, keepdim=True)
            else:
                grad_core = wide.mT @ g_B
            grad_core = grad_core * gamma.view(-1, 1, 1)
        return grad_x, grad_core, grad_gamma, *[None] * 6


def _delta(t: Tensor, core: Tensor, W: Tensor, I_in: Tensor, clamp: float | None) -> Tensor:
    delta = gradient.expand(gradient.mix(t, core), W, I_in)
    return delta if clamp is None else delta.clamp_(-clamp, clamp)
