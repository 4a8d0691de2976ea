"""Compute a patched model with numbers that can be fitted, such as γ of its layers.

All numbers are 0 at first, which leaves the model as it is; inside :meth:`Candidate.applied` it
computes with them, differentiably. Selections are constants, and autograd does the rest of SPEC §6:
what the core owes to γ is made of r × r numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vps.algorithm import core as cores
from vps.algorithm import gradient
from vps.algorithm.flow import Given, Layer
from vps.algorithm.policy import LayerGamma, plan_for
from vps.algorithm.weight import Matrix, matrix_products
from vps.evaluation.controls import Decided, decide
from vps.functional import arrange
from vps.masking import token_mask
from vps.model.calibration import columns_of
from vps.model.patching import sharpened_layers

Features = tuple[Tensor, Tensor]  # I_in and I_out, [r]


class Candidate:
    """Hold float64 numbers ``[n]``, a number a layer or one a column.

    By itself it is the plain model, whose numbers do nothing.

    Args:
        model: a patched model.
        names: the layers that get numbers; the others stay plain.
        by_column: as many numbers a layer as its update can have columns.
    """

    name = "plain"

    def __init__(self, model: nn.Module, names: list[str], by_column: bool) -> None:
        self.layers: dict[str, Any] = sharpened_layers(model)
        self.names = names
        self.by_column = by_column
        self.parts: dict[int, tuple[str, slice]] = {}
        total = 0
        for name in names:
            device = matrix_of(name, self.layers[name]).device
            count = columns_of(self.layers[name]) if by_column else 1
            self.parts[id(self.layers[name])] = name, slice(total, total + count)
            total += count
        self.values = torch.zeros(total, dtype=torch.float64, device=device, requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        """Return what an optimizer changes."""
        return [self.values]

    @property
    def scope(self) -> str:
        """Return the scope of the layers."""
        scope: str = next(iter(self.layers.values())).config.scope
        return scope

    @property
    def count(self) -> int:
        """Count the numbers that are fitted."""
        return len(self.values)

    def own(self, layer: Any) -> Tensor | None:
        """Return the numbers of a layer, without dims or ``[r]``; ``None`` where it has none."""
        part = self.parts.get(id(layer))
        if part is None:
            return None
        own = self.values[part[1]]
        return own if self.by_column else own[0]

    def compute(self, layer: Any, x: Tensor) -> Tensor | None:
        """Compute the output of ``layer`` for x ``[..., d_in]``; ``None`` leaves it to the base."""
        return None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model compute with the numbers."""
        try:
            for layer in self.layers.values():
                layer.sharpen = partial(self.compute, layer)
            yield
        finally:
            for layer in self.layers.values():
                vars(layer).pop("sharpen", None)

    def state(self) -> list[list[float]]:
        """Return the numbers, for JSON."""
        return [parameter.detach().flatten().tolist() for parameter in self.parameters]

    @torch.no_grad()
    def set_state(self, state: list[list[float]]) -> None:
        """Take the numbers of :meth:`state`."""
        for parameter, values in zip(self.parameters, state, strict=True):
            parameter.copy_(torch.tensor(values, dtype=torch.float64).view_as(parameter))


class Sharpening(Candidate):
    """Sharpen with γ as the numbers, by features selected for the input or by given ones.

    Args:
        model, names, by_column: as for :class:`Candidate`.
        features: of every layer, in place of those selected for the input.
        name: of the candidate.
    """

    name = "sharpening"

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        by_column: bool,
        features: Mapping[str, Features] | None = None,
        name: str = "sharpening",
    ) -> None:
        super().__init__(model, names, by_column)
        self.name = name
        self.features = features
        self.counts: dict[str, Features] | None = None  # how often each feature was selected
        self._of_peer: tuple[Tensor, int, Decided] | None = None

    def gammas(self) -> dict[str, float | tuple[float, ...]]:
        """Return γ by name of every sharpened layer, 0 where it has none."""
        found: dict[str, float | tuple[float, ...]] = dict.fromkeys(self.layers, 0.0)
        for name, part in self.parts.values():
            own = tuple(self.values[part].tolist())
            found[name] = own if self.by_column else own[0]
        return found

    @contextmanager
    def applied(self) -> Iterator[None]:
        before = [layer.gamma for layer in self.layers.values()]
        try:
            for layer in self.layers.values():
                own = self.own(layer)
                layer.gamma = LayerGamma(0.0 if own is None else own)
            with super().applied():
                yield
        finally:
            for layer, gamma in zip(self.layers.values(), before, strict=True):
                layer.gamma = gamma

    def compute(self, layer: Any, x: Tensor) -> Tensor | None:
        own = self.own(layer)
        if self.features is None and self.counts is None and not torch.is_grad_enabled():
            return type(layer).sharpen(layer, x)  # type: ignore[no-any-return]
        if own is None:
            return None
        grouped, _, mask, packing = arrange(x, None, layer.config.scope)
        if packing is not None:

            def part(x: Tensor, mask: Tensor) -> Tensor:
                with token_mask(mask):
                    y = self.compute(layer, x)
                assert y is not None
                return y

            return packing.apply(x, part)
        layers, name = layer.deciding(), self.parts[id(layer)][0]
        d_out, d_in = min(one.widths for one in layers)
        plan = plan_for(layer.config, layer.gradient, d_out, d_in, x.device, True)
        assert plan is not None
        features = plan.drawn if self.features is None else self.features[name]
        drawn = Given()
        if features is not None:
            I_in, I_out = (index.expand(len(grouped), -1) for index in features)
            drawn = Given(I_in, I_out)
        held, self._of_peer = self._of_peer, None
        if held is not None and held[0] is x and held[1] == x._version:
            found = held[2]
        else:
            found = decide(layers, grouped, mask, plan.settings, drawn)
            if len(layers) == 2:
                self._of_peer = x, x._version, found
        at = 0 if layer is layers[0] else 1
        if features is None:
            I_in, I_out = found.I_in, found.outputs[at]
        if self.counts is not None:
            for count, index in zip(self.counts[name], (I_in, I_out), strict=True):
                flat = (index if mask is None else index[mask.any(1)]).reshape(-1)
                count.index_add_(0, flat, count.new_ones(len(flat)))
        gamma = (own.new_ones(2), own) if self.by_column else (own.expand(2),)
        numbers = torch.cat([plan.bounds[:1], gamma[0], plan.bounds[3:], *gamma[1:]])
        fitted = Layer(Matrix(matrix_of(name, layer)), layer.bias, plan.settings, numbers)
        given, entropy = Given(I_in, I_out, found.energy), layer.state.signals(x.device)
        y = differentiable(grouped, fitted, mask, entropy, given, found.products[at])
        return y.view(*x.shape[:-1], -1)

    @contextmanager
    def counting(self) -> Iterator[dict[str, Features]]:
        """Count how often each layer selects each feature, ``[d_in]`` and ``[d_out]``."""
        self.counts = {
            name: tuple(  # type: ignore[misc]
                torch.zeros(d, dtype=torch.int64, device=self.values.device)
                for d in reversed(self.layers[name].widths)
            )
            for name in self.names
        }
        try:
            yield self.counts
        finally:
            self.counts = None


def differentiable(
    x: Tensor, layer: Layer, mask: Tensor | None, entropy: Tensor | None, given: Given, H: Tensor
) -> Tensor:
    """Compute the output ``[G, T, d_out]``, differentiable by x and the layer's numbers (SPEC §6).

    As :func:`vps.algorithm.flow.sharpen` does, to which the numbers are constants. Without a clamp
    nothing wider than ``[N, r]`` is kept for the backward pass.

    Args:
        x: ``[G, T, d_in]``.
        layer: with a matrix, and numbers that have a graph.
        mask: bool ``[G, T]``, True counts; ``None`` when all count.
        entropy: ℋ in nats, one element, or ``None``.
        given: features and energy.
        H: base product ``[G, T, d_out]``, with its graph.
    """
    I_in, I_out, energy = given[:3]
    settings = layer.settings
    assert I_in is not None and I_out is not None
    W = layer.weight.W  # type: ignore[attr-defined]
    products = matrix_products(x.detach(), W, H.detach(), I_in, I_out, None, settings)
    core = cores.build(products, layer.numbers, energy, entropy, mask, settings)
    group, token = (torch.arange(n, device=H.device) for n in H.shape[:2])
    t = H[group[:, None, None], token[:, None], I_out[:, None]]  # gather would keep H
    if core.inactive is not None:
        t = t.masked_fill(core.inactive.unsqueeze(1), 0.0)
    gamma = core.gamma.view(-1, 1, 1)
    if settings.clamp is None:
        y = H + _Expanded.apply(gradient.mix(t, core.matrix * gamma), W, I_in)
    else:
        delta = _Expanded.apply(gradient.mix(t, core.matrix), W, I_in)
        y = H + (gamma * delta.clamp(-settings.clamp, settings.clamp)).to(H.dtype)
    return y if layer.bias is None else y + layer.bias


class _Expanded(torch.autograd.Function):
    """Multiply by ``Bᵀ``, ``[G, T, r]`` to ``[G, T, d_out]``, keeping W and I_in alone.

    Tokens that select alike share the columns of W, so B is read by its distinct columns; a step of
    SmolLM2 on 6 examples takes 1.7 s so, and 2.2 s by :func:`vps.algorithm.gradient.expand`.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, W: Tensor, I_in: Tensor) -> Tensor:
        ctx.save_for_backward(W, I_in)
        B, slots = _Expanded.columns(W, I_in)
        dense = u.new_zeros(*u.shape[:2], B.shape[1])
        return dense.scatter_add_(-1, slots.expand_as(u), u) @ B.mT

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        B, slots = _Expanded.columns(*ctx.saved_tensors)
        return (g @ B).gather(-1, slots.expand(-1, g.shape[1], -1)), None, None

    @staticmethod
    def columns(W: Tensor, I_in: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distinct columns ``[d_out, u]``, and where each of B is, ``[G, 1, r]``."""
        features, slots = torch.unique(I_in, return_inverse=True)
        return W.index_select(1, features), slots.unsqueeze(1)


def matrix_of(name: str, layer: Any) -> Tensor:
    """Return ``W`` ``[d_out, d_in]`` of a layer.

    Raises:
        ValueError: it has no plain matrix in memory.
    """
    W: Tensor | None = layer.matrix()
    if W is None:
        raise ValueError(
            f"calibration: {name} must have a plain weight matrix in memory to be fitted, got a "
            f"{type(layer.module).__name__} that is sharpened through its own forward; a "
            "calibration of the plain model says what it would bring"
        )
    return W
