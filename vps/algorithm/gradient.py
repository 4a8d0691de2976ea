"""Compute the backward pass of a layer that a compiled backend computed (SPEC §6).

``∂L/∂x = (g + scatter of γ (g ∘ mask) B Cᵀ into the columns I_out) W``: selection, core, B, γ and
W are constants. ``∂L/∂W = gᵀx`` and ``∂L/∂b = Σ g``, as for the base layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vps.algorithm import tracing


def of_input(
    g: Tensor,
    weight: Tensor,
    I_in: Tensor,
    I_out: Tensor,
    core: Tensor,
    gamma: Tensor,
    t: Tensor | None,
    clamp: float | None,
) -> Tensor:
    """Return ``∂L/∂x``, ``[G, T, d_in]``.

    Args:
        g: ``∂L/∂y``, ``[G, T, d_out]``.
        weight: ``[d_out, d_in]``.
        I_in: selected inputs ``[G, r]``.
        I_out: selected outputs ``[G, r]``.
        core: ``C`` without γ, a diagonal ``[G, 1, r]`` or ``[G, r, r]``.
        gamma: ``[G]``.
        t: ``H[:, I_out]``, ``[G, T, r]``; needed with a clamp.
        clamp: bound of δ, or ``None``.
    """
    differentiated = tracing.is_differentiated() and not torch.compiler.is_compiling()
    if clamp is None and not differentiated and I_out.numel() < len(weight):
        return _by_rows(g, weight, I_in, I_out, core, gamma)
    constant = weight.detach() if differentiated else weight
    grad_delta = g
    if clamp is not None:
        assert t is not None
        grad_delta = g * (expand(mix(t, core), constant, I_in).abs() <= clamp)
    grad_u = contract(grad_delta, constant, I_in) * gamma.to(g.dtype).view(-1, 1, 1)
    grad_t = mix(grad_u, core if core.shape[1] == 1 else core.mT)
    if differentiated:  # with a graph to W through the base product; the update has W constant
        return g @ weight + grad_t @ constant[I_out]
    return g.scatter_add(-1, I_out.unsqueeze(1).expand_as(grad_t), grad_t) @ weight


def _by_rows(
    g: Tensor, weight: Tensor, I_in: Tensor, I_out: Tensor, core: Tensor, gamma: Tensor
) -> Tensor:
    """Return ``∂L/∂x`` without a clamp, reading g once.

    ``g W`` holds ``g B`` in its columns I_in; the update adds ``γ g B Cᵀ`` times the rows I_out
    of W.
    """
    product = g @ weight
    if product.shape[0] == 1:
        grad_u = product.index_select(-1, I_in[0])
    else:
        grad_u = product.gather(-1, I_in.unsqueeze(1).expand(-1, g.shape[1], -1))
    core = core * gamma.view(-1, 1, 1)
    grad_t = mix(grad_u, core if core.shape[1] == 1 else core.mT)
    if product.shape[0] == 1:
        product[0].addmm_(grad_t[0], weight.index_select(0, I_out[0]))
        return product
    rows = weight.index_select(0, I_out.reshape(-1)).view(*I_out.shape, -1)
    return product.baddbmm_(grad_t, rows)


def of_weight(g: Tensor, x: Tensor) -> Tensor:
    """Return ``∂L/∂W = gᵀx``, ``[d_out, d_in]``."""
    # No flatten and no mT: the vmap of torch.autograd.functional.jacobian knows neither.
    return g.reshape(-1, g.shape[-1]).transpose(0, 1) @ x.reshape(-1, x.shape[-1])


def of_bias(g: Tensor) -> Tensor:
    """Return ``∂L/∂b``, ``[d_out]``."""
    return g.sum((0, 1))


def mix(t: Tensor, core: Tensor) -> Tensor:
    """Return ``t C`` in the dtype of t."""
    mixed = t * core if core.shape[1] == 1 else t.to(core.dtype) @ core
    return mixed.to(t.dtype)


def expand(u: Tensor, weight: Tensor, I_in: Tensor) -> Tensor:
    """Return ``u Bᵀ`` ``[G, T, d_out]`` for u ``[G, T, r]``, by all of W where that costs less."""
    if reads_columns(weight, I_in):
        return u @ columns(weight, I_in).permute(1, 2, 0)
    index = I_in.unsqueeze(1).expand_as(u)
    dense = u.new_zeros(*u.shape[:2], weight.shape[1]).scatter_add_(-1, index, u)
    return F.linear(dense, weight)


def columns(weight: Tensor, I_in: Tensor) -> Tensor:
    """Return ``B``, the columns I_in ``[G, r]`` of W, as ``[d_out, G, r]``."""
    return weight.index_select(1, I_in.reshape(-1)).view(-1, *I_in.shape)


def reads_columns(weight: Tensor, I_in: Tensor) -> bool:
    """Return whether the groups ask for fewer columns than W has; False in an export.

    The graph of an export must hold for any number of groups.
    """
    return not tracing.is_exporting() and I_in.numel() < weight.shape[1]


def contract(g: Tensor, weight: Tensor, I_in: Tensor) -> Tensor:
    """Return ``g B`` ``[G, T, r]`` for g ``[G, T, d_out]``."""
    if reads_columns(weight, I_in):
        return g @ columns(weight, I_in).permute(1, 0, 2)
    return (g @ weight).gather(-1, I_in.unsqueeze(1).expand(-1, g.shape[1], -1))
