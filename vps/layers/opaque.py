"""``opaque_vps_linear``: sharpening of layers that are known by their forward alone.

``y = H + b + γ · clamp(H[:, I_out] C Bᵀ)`` as everywhere, with H and B from one call of the layer
on the tokens and r one-hot rows (:mod:`riding`). For weights that are quantized, adapted,
sharded or kept elsewhere (SPEC §4, identity 5).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vps.algorithm import coupling, gradient, policy, selection, tracing
from vps.algorithm import torch_backend as backend
from vps.algorithm.lbfgs import CurvatureMemory, Pair, precondition
from vps.algorithm.torch_backend import Inputs
from vps.backends import dispatch, sharing
from vps.config import VPSConfig
from vps.coupled import Projection, coupled_vps_linear
from vps.functional import arrange, cast, check_input, plan_for, refuse_tangents, vps_linear
from vps.layers import riding


class OpaqueProjection(NamedTuple):
    """One layer.

    Args:
        base: its forward and what else is known of W.
        gradient: as for :func:`vps.vps_linear`.
        memory: as for :func:`vps.vps_linear`.
        gamma: as for :func:`vps.vps_linear`.
        trains: whether a parameter of the layer asks for a gradient.
    """

    base: riding.Base
    gradient: bool = False
    memory: CurvatureMemory | None = None
    gamma: policy.LayerGamma | None = None
    trains: bool = False

    def is_plain(self) -> bool:
        """Whether its own γ is 0, so that it takes part in a joint selection alone."""
        return self.gamma is not None and self.gamma.is_zero


class Given(NamedTuple):
    """What a control decides in place of the layer: indices ``[G, r]``, pooled energy ``[G]``."""

    I_in: Tensor
    I_out: Tensor
    energy: Tensor | None = None


def opaque_vps_linear(
    x: Tensor,
    layers: tuple[OpaqueProjection, ...],
    config: VPSConfig,
    *,
    heads: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    state: policy.PolicyState | None = None,
    given: Given | None = None,
) -> list[Tensor | None]:
    """Sharpen one layer, or a query and a key layer together.

    Args:
        x: input ``[..., d_in]``.
        layers: one layer, or query and key.
        config: the settings.
        heads: query and key-value heads, with two layers.
        mask, state: as for :func:`vps.vps_linear`.
        given: features and energy of one layer that are not to be selected here.

    Returns:
        For each layer its output ``[..., d_out]``, differentiable in x and in what it trains, or
        ``None`` where γ is 0 whatever the input, for the caller to use the layer as it is.

    Raises:
        TypeError: x is no dense floating-point tensor, or a layer gives no ``[M, d_out]``.
        NotImplementedError: differentiated in forward mode (``torch.func.jvp``).
        ValueError: x does not fit the layers.
        RuntimeError: another backend than torch was asked for.

    Source: SPEC §2–§8.
    """
    d_in = layers[0].base.d_in
    check_input(x)
    refuse_tangents(x)
    if x.dim() == 0 or x.shape[-1] != d_in:
        raise ValueError(f"vps: x must be [..., {d_in}] to fit the layer, got {tuple(x.shape)}")
    factor = 1.0 if state is None else state.factor()
    d_out, calibrated = layers[-1].base.d_out, any(layer.gamma is not None for layer in layers)
    plans = [
        plan_for(config, layer.gradient, factor, d_out, d_in, x.device, x.dtype, calibrated)
        for layer in layers
    ]
    first = plans[0]
    if first is None or x.numel() == 0 or x.is_meta or first.settings.r == 0:
        return [None] * len(layers)
    if all(layer.is_plain() for layer in layers):
        return [None] * len(layers)
    dispatch.choose_opaque()
    if tracing.is_transforming() or torch.jit.is_tracing():
        if given is not None:
            raise NotImplementedError("vps: controls are computed in no transform and no trace")
        return _by_matrices(x, layers, config, heads, mask, state)
    kind = x.device.type
    tokens = cast(x, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
    grouped, mask, counted, packing = arrange(tokens, mask, config.scope)
    if packing is not None:
        part = partial(opaque_vps_linear, layers=layers, config=config, heads=heads, state=state)
        return packing.apply_all(x, part)
    I_in, drawn = _inputs(x, grouped, mask, counted, first, given)
    try:
        return _sharpened(
            x, grouped, counted, I_in, drawn, layers, plans, config, heads, state, given
        )
    finally:
        for layer in layers:
            layer.base.release()


def _sharpened(
    x: Tensor,
    grouped: Tensor,
    counted: Tensor | None,
    I_in: Tensor,
    drawn: Tensor | None,
    layers: tuple[OpaqueProjection, ...],
    plans: list[Any],
    config: VPSConfig,
    heads: tuple[int, int] | None,
    state: policy.PolicyState | None,
    given: Given | None,
) -> list[Tensor | None]:
    """The outputs, once the inputs are selected."""
    kind, d_in, first = x.device.type, x.shape[-1], plans[0]
    riders = riding.riders(I_in, d_in)
    products = []
    for layer in layers:  # no comprehension, in which a compiler could not break its graph
        products.append(riding.ride(layer.base, grouped.reshape(-1, d_in), riders.features))
    with torch.autocast(kind, enabled=False):
        H = [p.H.view(*grouped.shape[:2], -1) for p in products]
        energy, chosen = None, [drawn]
        if heads is not None:
            r = first.settings.r
            joint = coupling.decide(
                grouped.detach(), H[0].detach(), H[1].detach(), counted, I_in, r, *heads
            )
            energy = joint.energy if first.settings.adaptive else None
            chosen = [joint.features[:, 1], joint.features[:, 2]]
        elif given is not None:
            energy = given.energy
        entropy = None if state is None else state.entropy_on(x.device)
        ys: list[Tensor | None] = []
        for layer, plan, h, p, I_out in zip(layers, plans, H, products, chosen, strict=True):
            assert plan is not None
            if layer.is_plain():
                ys.append(None)
                continue
            inputs = Inputs(
                grouped.detach(), p.table, None, counted, I_in, I_out,
                plan.numbers(layer.gamma), entropy,                h, energy,
            )  # fmt: skip
            pairs = layer.memory.pairs if layer.memory is not None and config.lbfgs else ()
            y = _update(layer, p, inputs, riders, plan.settings, pairs)
            ys.append(y.view(*x.shape[:-1], -1))
    return ys


def _by_matrices(
    x: Tensor,
    layers: tuple[OpaqueProjection, ...],
    config: VPSConfig,
    heads: tuple[int, int] | None,
    mask: Tensor | None,
    state: policy.PolicyState | None,
) -> list[Tensor | None]:
    """The outputs inside a transform of ``torch.func`` or a trace, where no backward pass can be
    asked for rows of W: all of W is read by one-hot rows, and the update made of it is added."""
    plain, found = [], []
    d_in = x.shape[-1]
    for layer in layers:
        output = layer.base.product(x.reshape(-1, d_in))
        bias = layer.base.bias()
        output = output if bias is None else output + bias
        plain.append(output.view(*x.shape[:-1], -1))
        every = torch.arange(d_in, device=x.device)
        offset = None
        if layer.base.offset:
            zeros = torch.zeros(1, d_in, dtype=x.dtype, device=x.device)
            offset = layer.base.steady_product(zeros)[0]
        W = riding.columns(layer.base, every, x.dtype, offset).detach().t()
        found.append(Projection(W, None, layer.gradient, layer.memory, layer.gamma))
        layer.base.release()
    if heads is None:
        (one,) = found
        ys: Any = [
            vps_linear(
                x, one.weight, None, config, mask=mask, state=state, gradient=one.gradient,
                memory=one.memory, gamma=one.gamma,
            )
        ]  # fmt: skip
    else:
        query, key = found
        ys = coupled_vps_linear(x, query, key, *heads, config, mask=mask, state=state)
    return [base + (y - F.linear(x, p.weight)) for base, y, p in zip(plain, ys, found, strict=True)]


@torch.no_grad()
def _inputs(
    x: Tensor,
    grouped: Tensor,
    mask: Tensor | None,
    counted: Tensor | None,
    plan: Any,
    given: Given | None,
) -> tuple[Tensor, Tensor | None]:
    """``I_in`` ``[G, r]``, and ``I_out`` where it is known before H is."""
    if given is not None:
        return given.I_in, given.I_out
    if plan.drawn is not None:
        I_in, I_out = (index.expand(len(grouped), -1) for index in plan.drawn)
        return I_in, I_out
    r = plan.settings.r
    shared = grouped.dtype == x.dtype  # else it is selected from x as autocast has it
    I_in = sharing.find(x, mask, grouped.shape, r) if shared else None
    if I_in is None:
        count = None if counted is None else counted.sum(1).clamp_(min=1)
        I_in = selection.top_k(selection.statistics(grouped, counted, count, False)[0], r)
        if shared:
            sharing.remember(x, mask, grouped.shape, I_in)
    return I_in, None


def _update(
    layer: OpaqueProjection,
    products: riding.Products,
    inputs: Inputs,
    riders: riding.Riders,
    settings: policy.Settings,
    pairs: tuple[Pair, ...],
) -> Tensor:
    """``H + b + γ · clamp(δ)``, ``[G, T, d_out]``; autograd gives SPEC §6, for all but H in it is
    a constant."""
    H, I_out, mask = inputs.H, inputs.I_out, inputs.mask
    index, place = riders
    assert H is not None
    plain = products.output[: len(products.H)].view_as(H)
    bias = layer.base.bias()
    plain = plain if bias is None else plain + bias
    with torch.no_grad():
        values = H.detach()
        energy = None if inputs.energy is None else inputs.energy.clone()
        if I_out is None or (settings.adaptive and energy is None):
            count = None if mask is None else mask.sum(1).clamp_(min=1)
            s_out, measured = selection.statistics(values, mask, count, settings.adaptive)
            energy = measured if energy is None else energy
            I_out = selection.top_k(s_out, settings.r) if I_out is None else I_out
        known = riding.Columns(index, products.table)
        weight = riding.RiddenWeight(layer.base, known, place)
        assert inputs.I_in is not None
        core, gamma, t, inactive = backend.build(
            inputs, values, energy, inputs.I_in, I_out, None, settings, weight
        )
    if torch.is_grad_enabled() and products.output.requires_grad:
        if layer.trains:
            H = _through_input(products).view_as(H)
        t = backend.selected(H, I_out)
        if inactive is not None:
            t = t.masked_fill(inactive.unsqueeze(1), 0.0)
    gamma = gamma.view(-1, 1, 1)
    if settings.clamp is None and not pairs:
        y = plain + riding.expand(gradient.mix(t, core * gamma), products.table, place)
    else:
        delta = riding.expand(gradient.mix(t, core), products.table, place)
        if pairs:
            delta = precondition(pairs, delta)
        if settings.clamp is not None:
            delta = delta.clamp(-settings.clamp, settings.clamp)
        y = plain + delta * gamma.to(H.dtype)
    return y if mask is None else torch.where(mask.any(1)[:, None, None], y, plain)


def _through_input(products: riding.Products) -> Tensor:
    """H of the tokens whose gradient reaches x but no parameter: in the update W is a constant."""
    if not products.rows.requires_grad:
        return products.H.detach()
    output: Tensor = _ThroughInput.apply(products.rows, [products.output])
    H = output[: len(products.H)]
    return H if products.offset is None else H - products.offset


class _ThroughInput(torch.autograd.Function):
    """The output of a layer as a function of its input alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, output: list[Tensor]) -> Tensor:
        ctx.graph = rows, output[0]
        return output[0].detach().clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None]:
        rows, output = ctx.graph
        twice = torch.is_grad_enabled()
        return torch.autograd.grad(output, rows, g, retain_graph=True, create_graph=twice)[0], None
