"""Sharpen a layer, or a query and a key that select together, in torch.

The flow selects inputs, projects, selects outputs, decides, builds the core and updates:
``y = H + b + γ · clamp(H[:, I_out] C Bᵀ)`` by the identities of SPEC §4. All but H is a constant of
the backward pass, so autograd gives SPEC §6. Nothing waits for the device. Nothing is kept between
calls, so any edit of W, also of ``weight.data``, shows in the next call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vps.algorithm import core as cores
from vps.algorithm import gradient, selection
from vps.algorithm.core import Core
from vps.algorithm.lbfgs import Pair, precondition
from vps.algorithm.policy import LayerGamma, Settings
from vps.algorithm.weight import Products, Projection, Weight


class Layer(NamedTuple):
    """One layer as the flow takes it.

    Args:
        weight: W.
        bias: ``[held]`` or ``None``.
        settings: the choices that shape the code.
        numbers: numbers of the policy, ``[9]`` or ``[9 + r]``.
        pairs: L-BFGS pairs of the layer, oldest first.
        is_plain: whether its own γ is 0, so that it is not updated but still takes part in a joint
            selection.
        gamma: γ of the layer itself, which ``numbers`` already include, or ``None``.
    """

    weight: Weight
    bias: Tensor | None
    settings: Settings
    numbers: Tensor
    pairs: tuple[Pair, ...] = ()
    is_plain: bool = False
    gamma: LayerGamma | None = None


class Given(NamedTuple):
    """What is decided elsewhere: features that are drawn, shared, or chosen by a control.

    Args:
        I_in: ``[G, r]``, or ``None`` to select them.
        I_out: ``[G, r]`` for a single layer, or ``None`` to select them.
        energy: ``[G]``, or ``None`` to measure it.
        core: what a prompt decided for a single layer with these features, or ``None``.
        through: ``E`` ``[G, r, d_in]`` of that update (:mod:`vps.algorithm.fixed`), or ``None``.
        edit: ``I_in`` ``[G, 1, r]`` and ``E`` ``[G, d_in, r]``, views for the change of x.
        readers: the layers that read the same x (:class:`vps.algorithm.fixed.Readers`) and the
            place of this one among them, or ``None``.
    """

    I_in: Tensor | None = None
    I_out: Tensor | None = None
    energy: Tensor | None = None
    core: Core | None = None
    through: Tensor | None = None
    edit: tuple[Tensor, Tensor] | None = None
    readers: tuple[Any, int] | None = None


NOTHING = Given()


class Outcome(NamedTuple):
    """What the flow gives for one layer.

    Args:
        y: ``[G, T, held]``; ``None`` for a layer that is plain.
        I_out: ``[G, r]``.
        core: what was decided, or ``None`` for a layer that is plain.
        t: ``H[:, I_out]``, ``[G, T, r]``, 0 in columns left out, or ``None`` for a plain layer.
        rows: ``W[I_out]`` ``[G, r, d_in]`` where they are asked for and known, else ``None``.
    """

    y: Tensor | None
    I_out: Tensor
    core: Core | None
    t: Tensor | None
    rows: Tensor | None = None


def sharpen(
    x: Tensor,
    layers: tuple[Layer, ...],
    mask: Tensor | None,
    entropy: Tensor | None,
    heads: tuple[int, int] | None = None,
    given: Given = NOTHING,
    products: tuple[Tensor, ...] | None = None,
    wants_rows: bool = False,
) -> tuple[list[Outcome], Tensor]:
    """Sharpen one layer, or a query and a key.

    Args:
        x: ``[G, T, d_in]``, G groups of T tokens that share a selection.
        layers: one layer, or query and key.
        mask: bool ``[G, T]``, True counts in the statistics; ``None`` when all count.
        entropy: ℋ in nats, or −1 where none is set, and the factor of the history, float64
            ``[2]`` (:meth:`PolicyState.signals`); ``None`` for neither.
        heads: query and key-value heads, with two layers.
        given: what is decided already.
        products: H of each layer, ``[G, T, d_out]``, if it is known.
        wants_rows: whether the rows I_out of each W are asked for.

    Returns:
        The outcome for each layer, and ``I_in`` ``[G, r]``.
    """
    first, I_in = layers[0], given.I_in
    r = first.settings.r
    if I_in is None:
        with torch.no_grad():
            I_in = first.weight.select_inputs(x.detach(), mask, r)
    projections = []
    for at, layer in enumerate(layers):  # a compiler cannot break in a comprehension
        known = () if products is None else (products[at],)
        projections.append(layer.weight.project(x, layer.bias, I_in, *known))
    with torch.no_grad():
        outputs, energies = _select(projections, layers, mask, heads, given)
        settings = [layer.settings for layer in layers]
        if given.core is not None:  # of the products only t is needed
            settings = [own.bare() for own in settings]
        found, energy = first.weight.complete(projections, outputs, settings, energies)
        decided = [
            _decide(layer, numbers, energy, entropy, mask, given)
            for layer, numbers in zip(layers, found, strict=True)
        ]
        rows: list[Tensor | None] = [None] * len(layers)
        if wants_rows:
            rows = first.weight.rows(projections, outputs)
    outcomes = []
    for layer, own, I_out, core, of_W in zip(
        layers, projections, outputs, decided, rows, strict=True
    ):
        y, t = (None, None) if core is None else _update(layer, own, I_out, core, mask)
        outcomes.append(Outcome(y, I_out, core, t, of_W))
    return outcomes, I_in


def _decide(
    layer: Layer,
    numbers: Products,
    energy: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor | None,
    given: Given,
) -> Core | None:
    """Return what is decided for one layer, or ``None`` for a layer that is plain."""
    if layer.is_plain or given.core is not None:
        return given.core
    energy = energy if layer.settings.adaptive else None
    return cores.build(numbers, layer.numbers, energy, entropy, mask, layer.settings)


def _select(
    projections: list[Projection],
    layers: tuple[Layer, ...],
    mask: Tensor | None,
    heads: tuple[int, int] | None,
    given: Given,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return ``I_out`` ``[G, r]`` of each layer, and energies ``[G]`` of the outputs held here."""
    settings = layers[0].settings
    measuring = settings.adaptive and given.energy is None and given.core is None
    energies = [] if given.energy is None else [given.energy]
    if given.I_out is not None and not measuring:
        return [given.I_out], energies
    scores = []
    for projection in projections:
        found, energy = selection.counted_statistics(projection.H.detach(), mask, measuring)
        scores.append(found)
        if energy is not None:
            energies.append(energy)
    if given.I_out is not None:
        return [given.I_out], energies
    weights = [layer.weight for layer in layers]
    return weights[0].select_outputs(weights, scores, settings.r, heads), energies


def _update(
    layer: Layer, projection: Projection, I_out: Tensor, core: Core, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ``H + b + γ · clamp(t C Bᵀ)`` and t; a group that does not count keeps the base's."""
    clamp, t = layer.settings.clamp, projection.selected(I_out)
    if core.inactive is not None:  # keeps out even NaN
        t = t.masked_fill(core.inactive.unsqueeze(1), 0.0)
    gamma = core.gamma.view(-1, 1, 1)
    if clamp is None and not layer.pairs:
        y = projection.add(gradient.mix(t, core.matrix * gamma))
    else:
        delta = projection.expand(gradient.mix(t, core.matrix))
        if layer.pairs:
            delta = precondition(layer.pairs, delta)
        if clamp is not None:
            delta = delta.clamp(-clamp, clamp)
        y = projection.output + delta * gamma.to(delta.dtype)
    bias = projection.bias()
    if bias is not None:
        y = y + bias
    if mask is None or selection.is_read_freely(mask) and mask.any(1).all():
        return y, t
    return torch.where(mask.any(1)[:, None, None], y, projection.base()), t
