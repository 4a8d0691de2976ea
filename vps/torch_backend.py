"""The torch backend: ``y = H + b + γ · clamp(H[:, I_out] C Bᵀ)`` by the identities of SPEC §4.

``A`` is never multiplied; coupling, clip, second order and γ fold into the r × r core ``C``.
Nothing waits for the device and nothing is kept between calls: the norms of the selected rows and
columns are read from W each time, so they are right after any edit of it, ``weight.data`` too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vps import clipping, policy, selection
from vps.config import VPSConfig


@dataclass(frozen=True)
class Call:
    """What a call is given beside tensors; ``r`` is :func:`vps.policy.largest_rank`."""

    config: VPSConfig
    state: policy.PolicyState | None
    gradient: bool
    r: int

    @property
    def coupled(self) -> bool:
        """Whether the builder is SC."""
        builder = self.config.builder
        return builder == "sc" or (builder == "hybrid" and self.gradient)


@dataclass(frozen=True)
class Update:
    """The low-rank update of G groups of tokens."""

    I_in: Tensor  # [G, r]
    I_out: Tensor  # [G, r]
    inactive: Tensor | None  # bool [G, r], columns the policy left out
    core: Tensor  # [G, 1, r], a diagonal, or [G, r, r]; holds γ unless there is a clamp
    columns: Tensor | None  # [d_out, G * r], W[:, I_in]; None when all of W is read instead
    gamma: float | Tensor  # γ to apply after the clamp, [G]


def sharpen(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, call: Call
) -> Tensor:
    """Output ``[G, T, d_out]`` for x ``[G, T, d_in]`` and mask ``[G, T]``, differentiable."""
    wants_gradient = x.requires_grad or weight.requires_grad
    wants_gradient = wants_gradient or (bias is not None and bias.requires_grad)
    if wants_gradient and torch.is_grad_enabled():
        return _Sharpen.apply(x, weight, bias, mask, call)
    return _forward(x, weight, bias, mask, call)[0]


class _Sharpen(torch.autograd.Function):
    """SPEC §6: selection, core, B, γ and W are constants of the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        call: Call,
    ) -> Tensor:
        y, t, update = _forward(x, weight, bias, mask, call)
        ctx.clamp = call.config.clamp
        ctx.scalar_gamma = None if isinstance(update.gamma, Tensor) else update.gamma
        ctx.save_for_backward(
            x if weight.requires_grad else None,
            weight,
            t if ctx.clamp is not None else None,
            update.I_in,
            update.I_out,
            update.inactive,
            update.core,
            update.columns,
            update.gamma if isinstance(update.gamma, Tensor) else None,
        )
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, t, I_in, I_out, inactive, core, columns, gamma = ctx.saved_tensors
        gamma = ctx.scalar_gamma if gamma is None else gamma
        update = Update(I_in, I_out, inactive, core, columns, gamma)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_delta = g
            if ctx.clamp is not None:
                delta = _expand(_mix(t, update), weight, update)
                grad_delta = _scale_groups(g * (delta.abs() <= ctx.clamp), gamma)
            grad_t = _unmix(_contract(grad_delta, weight, update), update)
            index = I_out.unsqueeze(1).expand_as(grad_t)
            grad_x = g.scatter_add(-1, index, grad_t) @ weight
        if ctx.needs_input_grad[1]:
            grad_weight = g.flatten(0, 1).mT @ x.flatten(0, 1)
        if ctx.needs_input_grad[2]:
            grad_bias = g.sum((0, 1))
        return grad_x, grad_weight, grad_bias, None, None


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, call: Call
) -> tuple[Tensor, Tensor, Update]:
    """Output, selected outputs ``[G, T, r]`` and the update."""
    H = F.linear(x, weight)
    update = _build(x, H, weight, mask, call)
    t = _select(H, update.I_out)
    if update.inactive is not None:
        t = t.masked_fill_(update.inactive.unsqueeze(1), 0.0)
    u = _mix(t, update)
    if call.config.clamp is not None:
        delta = _expand(u, weight, update).clamp_(-call.config.clamp, call.config.clamp)
        y = _scale_groups(delta, update.gamma).add_(H)
    elif update.columns is None:
        y = _expand(u, weight, update).add_(H)
    elif len(H) == 1:
        target = H[0] if mask is None else H[0].clone()  # the mask's branch needs H below
        y = target.addmm_(u[0], update.columns.t()).unsqueeze(0)
    else:
        y = torch.baddbmm(H, u, _grouped(update.columns, u).permute(1, 2, 0))
    if bias is not None:
        y = y.add_(bias)
    if mask is not None:  # a group without a counted token keeps the bits of the base layer
        base = H if bias is None else F.linear(x, weight, bias)
        y = torch.where(mask.any(1)[:, None, None], y, base)
    return y, t, update


def _build(x: Tensor, H: Tensor, W: Tensor, mask: Tensor | None, call: Call) -> Update:
    """Policy first, then the selection and its core (SPEC §3–§5)."""
    config, r, groups = call.config, call.r, len(H)
    count = None if mask is None else mask.sum(1).clamp_(min=1)
    adaptive = policy.needs_energy(config)
    s_out, energy = selection.statistics(H, mask, count, adaptive)
    if config.builder == "random":
        drawn = selection.random_features(config.seed, W.shape[1], W.shape[0], r)
        I_in, I_out = (torch.tensor(i, device=x.device).expand(groups, r) for i in drawn)
    else:
        s_in, _ = selection.statistics(x, mask, count, False)
        I_in, I_out = selection.top_k(s_in, r), selection.top_k(s_out, r)
    decision = policy.decide(config, energy, call.state, r)

    # Once the groups ask for more columns than W has, reading all of W is the cheaper way.
    columns = W.index_select(1, I_in.reshape(-1)) if groups * r < W.shape[1] else None
    mixing = None
    if call.coupled:
        X_A, Y = (selection.clean(_select(*pair), mask) for pair in ((x, I_in), (H, I_out)))
        mixing = selection.coupling(X_A, Y, decision.inactive, config.alpha)
    core = _core(W, I_in, I_out, columns, mixing, decision, config)
    gamma = decision.gamma
    if config.clamp is None:
        core = _scale_groups(core, gamma)
        gamma = 1.0
    if mask is not None:
        core = core.masked_fill(~mask.any(1)[:, None, None], 0.0)
    return Update(I_in, I_out, decision.inactive, core, columns, gamma)


def _core(
    W: Tensor,
    I_in: Tensor,
    I_out: Tensor,
    columns: Tensor | None,
    mixing: Tensor | None,
    decision: policy.Decision,
    config: VPSConfig,
) -> Tensor:
    """``C`` before γ: a diagonal ``[G, 1, r]`` for SK of order 1, else ``[G, r, r]``.

    With ``D = diag(1/√s)``: ``C = V D (I + γ/2 Mᵀ) D``, ``M = D Vᵀ B[I_out] D`` for order 2.
    """
    groups, r = I_in.shape
    dtype = selection.accumulation_dtype(W.dtype)
    scale = None
    if config.tau is not None:
        scale = _clip(W, I_in, I_out, columns, mixing, decision.inactive, config, config.tau)
    if mixing is None and decision.second_order is False:
        if scale is None:
            return torch.ones(groups, 1, r, dtype=dtype, device=W.device)
        return scale.reciprocal_().expand(groups, r).unsqueeze(1)
    V = torch.eye(r, dtype=dtype, device=W.device) if mixing is None else mixing.to(dtype)
    V = V.expand(groups, r, r)
    if scale is None:
        scale = torch.ones(1, r, dtype=dtype, device=W.device)
    if decision.second_order is False:
        return V / scale.unsqueeze(1)
    D = scale.expand(groups, r).rsqrt().unsqueeze(1)  # scales columns
    B_selected = W[I_out.unsqueeze(2), I_in.unsqueeze(1)].to(dtype)
    M = D.mT * (V.mT @ B_selected) * D
    if decision.inactive is not None:
        M = M.masked_fill(decision.inactive.unsqueeze(1) | decision.inactive.unsqueeze(2), 0.0)
    half = _scale_groups(M.mT, decision.gamma) / 2
    if isinstance(decision.second_order, Tensor):
        half = half * decision.second_order[:, None, None]
    return (V * D) @ (torch.eye(r, dtype=dtype, device=W.device) + half) * D


def _clip(
    W: Tensor,
    I_in: Tensor,
    I_out: Tensor,
    columns: Tensor | None,
    mixing: Tensor | None,
    inactive: Tensor | None,
    config: VPSConfig,
    tau: float,
) -> Tensor:
    """``s`` of SPEC §4, ``[G, r]`` or ``[G, 1]``, from norms and Gram matrices alone."""
    groups, r = I_in.shape
    dtype = selection.accumulation_dtype(W.dtype)
    norm = torch.linalg.vector_norm
    spectral = config.clip == "spectral"
    if columns is not None:
        norm_B = norm(columns, 2, dim=0, dtype=dtype).view(groups, r)
    else:
        norm_B = norm(W, 2, dim=0, dtype=dtype)[I_in]
    if mixing is None and not spectral:
        if columns is None:
            norm_A = norm(W, 2, dim=1, dtype=dtype)[I_out]
        else:
            norm_A = norm(W.index_select(0, I_out.reshape(-1)), 2, dim=1, dtype=dtype)
            norm_A = norm_A.view(groups, r)
        return clipping.component_scale(norm_A, norm_B, tau)
    rows = W[I_out].to(dtype)
    gram_A = rows @ rows.mT
    if mixing is not None:
        mixing = mixing.to(dtype)
        gram_A = mixing.mT @ gram_A @ mixing
    if not spectral:
        norm_A = gram_A.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        return clipping.component_scale(norm_A, norm_B, tau)
    B = W[:, I_in].to(dtype) if columns is None else _grouped(columns, I_in).to(dtype)
    gram_B = torch.einsum("ogc,oge->gce", B, B)
    if inactive is not None:
        gram_A = gram_A.masked_fill(inactive.unsqueeze(1) | inactive.unsqueeze(2), 0.0)
    return clipping.spectral_scale(gram_A, gram_B, tau)


def _grouped(columns: Tensor, like: Tensor) -> Tensor:
    """``[d_out, G * r]`` seen as ``[d_out, G, r]``, G and r those of ``like`` [G, ..., r]."""
    return columns.view(-1, like.shape[0], like.shape[-1])


def _select(values: Tensor, index: Tensor) -> Tensor:
    """``values[g, :, index[g]]``: ``[G, T, d]`` and ``[G, r]`` to a new ``[G, T, r]``."""
    if len(values) == 1:
        return values.index_select(-1, index[0])
    return values.gather(-1, index.unsqueeze(1).expand(-1, values.shape[1], -1))


def _mix(t: Tensor, update: Update) -> Tensor:
    """``u = t C`` in the dtype of t."""
    core = update.core
    mixed = t * core if core.shape[1] == 1 else t.to(core.dtype) @ core
    return mixed.to(t.dtype)


def _unmix(u: Tensor, update: Update) -> Tensor:
    """``u Cᵀ``, zero in the columns left out: the transpose of selecting and mixing."""
    core = update.core
    t = u * core if core.shape[1] == 1 else u.to(core.dtype) @ core.mT
    if update.inactive is not None:
        t = t.masked_fill(update.inactive.unsqueeze(1), 0.0)
    return t.to(u.dtype)


def _expand(u: Tensor, W: Tensor, update: Update) -> Tensor:
    """``u Bᵀ``: ``[G, T, r]`` to ``[G, T, d_out]``."""
    if update.columns is not None:
        return u @ _grouped(update.columns, u).permute(1, 2, 0)
    index = update.I_in.unsqueeze(1).expand_as(u)
    return F.linear(u.new_zeros(*u.shape[:2], W.shape[1]).scatter_add_(-1, index, u), W)


def _contract(g: Tensor, W: Tensor, update: Update) -> Tensor:
    """``g B``: ``[G, T, d_out]`` to ``[G, T, r]``."""
    if update.columns is not None:
        return g @ _grouped(update.columns, update.I_in).permute(1, 0, 2)
    return _select(g @ W, update.I_in)


def _scale_groups(values: Tensor, gamma: float | Tensor) -> Tensor:
    """``γ · values`` with γ a number or one per group."""
    if isinstance(gamma, Tensor):
        return values * gamma.to(values.dtype)[:, None, None]
    return values * gamma
