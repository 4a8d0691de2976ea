"""The torch backend: ``y = H + b + γ · clamp(H[:, I_out] C Bᵀ)`` by the identities of SPEC §4.

``A`` is never multiplied; coupling, clip and second order fold into the r × r core ``C``.
Nothing waits for the device and nothing is kept between calls: the norms of the selected rows and
columns are read from W each time, so they are right after any edit of it, ``weight.data`` too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vps.algorithm import clipping, gradient, policy, selection
from vps.algorithm.constants import constant
from vps.algorithm.lbfgs import Pair, precondition
from vps.algorithm.policy import Settings
from vps.algorithm.weight import Weight, WeightMatrix


class Inputs(NamedTuple):
    """The tensors that the operator takes, in its order.

    Args:
        x: ``[G, T, d_in]``, G groups of T tokens that share a selection.
        weight: ``[d_out, d_in]``.
        bias: ``[d_out]`` or ``None``.
        mask: bool ``[G, T]``, True counts in the statistics; ``None`` when all do.
        I_in: selected inputs ``[G, r]`` where they are known, or ``None``.
        I_out: selected outputs ``[G, r]`` where they are known, or ``None``.
        policy: the numbers of :func:`policy.bounds`, float64 ``[9]``, and a factor of each
            column, ``[9 + r]``, where the layer has them (:class:`policy.LayerGamma`).
        entropy: ℋ in nats, one element, or ``None``.
        H: base product ``[G, T, d_out]`` where it is known, or ``None``.
        energy: ``[G]`` where it is known, or ``None``.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    I_in: Tensor | None
    I_out: Tensor | None
    policy: Tensor
    entropy: Tensor | None
    H: Tensor | None = None
    energy: Tensor | None = None


class Outputs(NamedTuple):
    """The output and what its backward pass needs.

    Args:
        y: ``[G, T, d_out]``.
        I_in: ``[G, r]``.
        I_out: ``[G, r]``.
        core: ``C`` without γ, a diagonal ``[G, 1, r]`` or ``[G, r, r]``; 0 where left out.
        gamma: ``[G]``, 0 for a group without a counted token.
        t: ``H[:, I_out]``, ``[G, T, r]``, 0 in columns left out; needed with a clamp alone.
    """

    y: Tensor
    I_in: Tensor
    I_out: Tensor
    core: Tensor
    gamma: Tensor
    t: Tensor | None


def sharpen(
    inputs: Inputs,
    settings: Settings,
    forward: Callable[[Inputs, Settings], Outputs],
    pairs: tuple[Pair, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Output ``[G, T, d_out]``, differentiable, and ``I_in``, with ``forward`` of a backend.

    ``pairs`` are the L-BFGS pairs with which ``forward`` computes.
    """
    if torch.jit.is_tracing():
        return by_autograd(inputs, settings, forward, pairs)
    if needs_gradient(inputs):
        y, I_in = _Sharpen.apply(*inputs, settings, forward, pairs)
        return y, I_in
    return forward(inputs, settings)[:2]


def by_autograd(
    inputs: Inputs,
    settings: Settings,
    forward: Callable[[Inputs, Settings], Outputs],
    pairs: tuple[Pair, ...],
) -> tuple[Tensor, Tensor]:
    """As :func:`sharpen` in operators of torch alone: with what ``forward`` decides as constants,
    autograd gives SPEC §6. For ``torch.jit.trace``, whose graph is saved, and is traced with
    gradients and checked without, and for compiled transforms, which know no function of ours."""
    x, weight, bias, mask = inputs[:4]
    fixed = Inputs(*(None if each is None else each.detach() for each in inputs))  # type: ignore[arg-type]
    H = F.linear(x, fixed.weight)
    out = forward(fixed._replace(bias=None, H=H.detach()), settings)
    t = selected(H, out.I_out)
    delta = gradient.expand(gradient.mix(t, out.core), fixed.weight, out.I_in)
    if pairs:
        delta = precondition(pairs, delta)
    if settings.clamp is not None:
        delta = delta.clamp(-settings.clamp, settings.clamp)
    if torch.jit.is_tracing() and not weight.requires_grad:
        base = H if bias is None else H + bias
    else:
        base = F.linear(x, weight, bias)
    y = base + delta * out.gamma.to(delta.dtype).view(-1, 1, 1)
    return (y if mask is None else torch.where(mask.any(1)[:, None, None], y, base)), out.I_in


def needs_gradient(inputs: Inputs) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in inputs[:3]
    )


class _Sharpen(torch.autograd.Function):
    """Saves what :mod:`vps.algorithm.gradient` needs; W, B and the selection are constants."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        inputs, (settings, forward, pairs) = Inputs(*arguments[:-3]), arguments[-3:]
        out = forward(inputs, settings)
        ctx.clamp = settings.clamp
        ctx.pairs = pairs
        ctx.save_for_backward(
            inputs.x if inputs.weight.requires_grad else None,
            inputs.weight,
            *out[1:5],
            None if settings.clamp is None else out.t,
        )
        ctx.mark_non_differentiable(out.I_in)
        # A graph of torch 2.11 hands out every tensor made in here, and one that calls in place
        # made the same tensor as y takes y's gradient with it.
        y = out.y.view_as(out.y) if torch.compiler.is_compiling() else out.y
        return y, out.I_in

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, I_in, I_out, core, gamma, t = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            gradient.of_input(g, weight, I_in, I_out, core, gamma, t, ctx.clamp, ctx.pairs)
            if wanted[0]
            else None,
            gradient.of_weight(g, x) if wanted[1] else None,
            gradient.of_bias(g) if wanted[2] else None,
            *[None] * (len(wanted) - 3),
        )


def forward(inputs: Inputs, settings: Settings, pairs: tuple[Pair, ...] = ()) -> Outputs:
    """Policy first, then the selection and its core, then the update (SPEC §3–§5, §8)."""
    x, W, bias, mask, I_in, I_out = inputs[:6]
    H = F.linear(x, W) if inputs.H is None else inputs.H
    count = None if mask is None else mask.sum(1).clamp_(min=1)
    s_out, energy = None, None if inputs.energy is None else inputs.energy.clone()
    if I_out is None or (settings.adaptive and energy is None):
        s_out, measured = selection.statistics(H, mask, count, settings.adaptive)
        energy = measured if energy is None else energy
    if I_in is None:
        s_in, _ = selection.statistics(x, mask, count, False)
        I_in = selection.top_k(s_in, settings.r)
    if I_out is None:
        assert s_out is not None
        I_out = selection.top_k(s_out, settings.r)
    B = gradient.columns(W, I_in) if gradient.reads_columns(W, I_in) else None
    core, gamma, t, _ = build(inputs, H, energy, I_in, I_out, B, settings)
    keep_H = mask is not None or inputs.H is not None
    if pairs:
        delta = precondition(pairs, gradient.expand(gradient.mix(t, core), W, I_in))
        y = add(H, delta, gamma, settings.clamp)
    else:
        y = apply(H, t, core, gamma, W, I_in, B, settings.clamp, keep_H)
    if bias is not None:
        y = y.add_(bias)
    # A group without a counted token keeps the bits of the base layer.
    if mask is not None and not (selection.is_read_freely(mask) and mask.any(1).all()):
        base = H if bias is None else F.linear(x, W, bias)
        y = torch.where(mask.any(1)[:, None, None], y, base)
    return Outputs(y, I_in, I_out, core, gamma, t)


def build(
    inputs: Inputs,
    H: Tensor,
    energy: Tensor | None,
    I_in: Tensor,
    I_out: Tensor,
    B: Tensor | None,
    settings: Settings,
    weight: Weight | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(core, γ, t)`` of :class:`Outputs` and the columns left out, bool ``[G, r]`` or ``None``.

    Args:
        inputs: of the layer.
        H: ``[G, T, d_out]``.
        energy: ``[G]``, overwritten; ``None`` when nothing is adaptive.
        I_in: ``[G, r]``.
        I_out: ``[G, r]``.
        B: ``[d_out, G, r]``, or ``None`` to read all of W instead.
        settings: the rest.
        weight: how W is read where it is not ``inputs.weight``, which then is not looked at.
    """
    x, mask = inputs.x, inputs.mask
    weight = WeightMatrix(inputs.weight, I_in, B) if weight is None else weight
    # In float64, which the policy is given in: float32 would round a σ near 1 over the next rank.
    wide = None if energy is None else energy.to(inputs.policy.dtype)
    decision = policy.decide(inputs.policy, wide, inputs.entropy, H.shape[0], settings)
    numbers = inputs.policy.to(selection.accumulation_dtype(H.dtype))
    gamma, inactive = decision.gamma.to(numbers.dtype), decision.inactive
    decision = policy.Decision(gamma, inactive, decision.second_order)
    t = selected(H, I_out)
    mixing = None
    if settings.coupled:
        X_A, Y = (selection.clean(z, mask) for z in (selected(x, I_in), t))
        mixing = selection.coupling(X_A, Y, inactive, settings.alpha)
    columns = numbers[policy.NUMBERS :] if len(numbers) > policy.NUMBERS else None
    core = _core(weight, I_out, mixing, decision, columns, settings)
    if inactive is not None:
        t.masked_fill_(inactive.unsqueeze(1), 0.0)
        core = core.masked_fill(inactive.unsqueeze(1), 0.0)
    if mask is not None:
        gamma = gamma.masked_fill(~mask.any(1), 0.0)
    return core, gamma, t, inactive


def apply(
    H: Tensor,
    t: Tensor,
    core: Tensor,
    gamma: Tensor,
    W: Tensor,
    I_in: Tensor,
    B: Tensor | None,
    clamp: float | None,
    keep_H: bool,
) -> Tensor:
    """``H + γ · clamp(t C Bᵀ)``, in place of H if it may be."""
    if clamp is not None:
        return add(H, gradient.expand(gradient.mix(t, core), W, I_in), gamma, clamp)
    u = gradient.mix(t, core * gamma.view(-1, 1, 1))
    if B is None:
        return gradient.expand(u, W, I_in).add_(H)
    if H.shape[0] == 1:
        y = H.clone() if keep_H else H  # no view, which an output that is edited could not be
        y[0].addmm_(u[0], B.squeeze(1).t())
        return y
    return torch.baddbmm(H, u, B.permute(1, 2, 0))


def add(H: Tensor, delta: Tensor, gamma: Tensor, clamp: float | None) -> Tensor:
    """``H + γ · clamp(δ)``, in place of δ ``[G, T, d_out]``."""
    if clamp is not None:
        delta = delta.clamp_(-clamp, clamp)
    return delta.mul_(gamma.to(H.dtype).view(-1, 1, 1)).add_(H)


def _core(
    weight: Weight,
    I_out: Tensor,
    mixing: Tensor | None,
    decision: policy.Decision,
    columns: Tensor | None,
    settings: Settings,
) -> Tensor:
    """``C`` without γ: a diagonal ``[G, 1, r]`` for SK of order 1, else ``[G, r, r]``.

    With ``D = diag(1/√s)`` and ``w`` the factors of the columns ``[r]``, 1 where there are none:
    ``C = V D (I + γ/2 w Mᵀ) D w``, ``M = D Vᵀ B[I_out] D`` for order 2.
    """
    groups, r = I_out.shape
    dtype, device = decision.gamma.dtype, decision.gamma.device
    one = constant(1.0, decision.gamma)
    scale = one.expand(groups, r)
    if settings.tau is not None:
        scale = _clip(weight, I_out, mixing, decision.inactive, settings, settings.tau)
    if mixing is None and decision.second_order is None:
        inverse = scale.reciprocal() if columns is None else columns / scale
        return inverse.expand(groups, r).unsqueeze(1)
    V = torch.eye(r, dtype=dtype, device=device) if mixing is None else mixing.to(dtype)
    V = V.expand(groups, r, r)
    if decision.second_order is None:
        return V / scale.unsqueeze(1) if columns is None else V * (columns / scale).unsqueeze(1)
    D = scale.expand(groups, r).rsqrt().unsqueeze(1)  # scales columns
    M = D.mT * (V.mT @ weight.crossing(I_out)) * D
    if decision.inactive is not None:
        M = M.masked_fill(decision.inactive.unsqueeze(1) | decision.inactive.unsqueeze(2), 0.0)
    half = M.mT * (decision.gamma * decision.second_order / 2).view(-1, 1, 1)
    if columns is not None:
        half, D_out = half * columns.unsqueeze(-1), D * columns
    else:
        D_out = D
    return (V * D) @ (torch.eye(r, dtype=dtype, device=device) + half) * D_out


def _clip(
    weight: Weight,
    I_out: Tensor,
    mixing: Tensor | None,
    inactive: Tensor | None,
    settings: Settings,
    tau: float,
) -> Tensor:
    """``s`` of SPEC §4, ``[G, r]`` or ``[G, 1]``, from norms and Gram matrices alone."""
    if mixing is None and not settings.spectral:
        return clipping.component_scale(weight.norm_out(I_out), weight.norm_in(), tau)
    gram_A = weight.gram_out(I_out)
    if mixing is not None:
        mixing = mixing.to(gram_A.dtype)
        gram_A = mixing.mT @ gram_A @ mixing
    if not settings.spectral:
        norm_A = gram_A.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        return clipping.component_scale(norm_A, weight.norm_in(), tau)
    if inactive is not None:
        gram_A = gram_A.masked_fill(inactive.unsqueeze(1) | inactive.unsqueeze(2), 0.0)
    return clipping.spectral_scale(gram_A, weight.gram_in(), tau)


def selected(values: Tensor, index: Tensor) -> Tensor:
    """``values[g, :, index[g]]``: ``[G, T, d]`` and ``[G, r]`` to a new ``[G, T, r]``."""
    if values.shape[0] == 1 and not torch.jit.is_tracing():  # whose graph holds for any number
        return values.index_select(-1, index[0])
    return values.gather(-1, index.unsqueeze(1).expand(-1, values.shape[1], -1))


def square(core: Tensor) -> Tensor:
    """A core as ``[G, r, r]``, also where it is the diagonal ``[G, 1, r]``."""
    return core if core.shape[1] == core.shape[2] else core.squeeze(1).diag_embed()
