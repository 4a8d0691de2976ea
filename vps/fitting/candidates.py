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
import torch.nn.functional as F
from torch import Tensor, nn

from vps.algorithm import core as cores
from vps.algorithm import coupling, gradient, selection
from vps.algorithm.flow import Given, Layer
from vps.algorithm.policy import NUMBERS, LayerGamma, Settings, plan_for
from vps.algorithm.weight import (
    Matrix,
    Products,
    gather,
    matrix_products,
    needs_gram_of_columns,
    needs_gram_of_rows,
)
from vps.backends import dispatch, sharing
from vps.backends.call import Call, Inputs, Kind
from vps.functional import arrange
from vps.masking import token_mask
from vps.model.calibration import columns_of
from vps.model.patching import sharpened_layers

Features = tuple[Tensor, Tensor]  # I_in and I_out, [r]
Norms = tuple[Tensor, Tensor]  # of the rows [d_out] and the columns [d_in] of W


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
        self._joint: tuple[Tensor, int, coupling.Joint] | None = None
        self._norms: dict[str, Norms] = {}

    def gammas(self) -> dict[str, float | tuple[float, ...]]:
        """Return γ by name of every sharpened layer, 0 where it has none."""
        found: dict[str, float | tuple[float, ...]] = dict.fromkeys(self.layers, 0.0)
        for name, part in self.parts.values():
            own = tuple(self.values[part].tolist())
            found[name] = own if self.by_column else own[0]
        return found

    def compute(self, layer: Any, x: Tensor) -> Tensor | None:
        own = self.own(layer)
        if own is None:
            return None
        d_out, d_in = min(one.widths for one in layer.deciding())
        factor = layer.state.factor()
        plan = plan_for(layer.config, layer.gradient, factor, d_out, d_in, x.device, True)
        assert plan is not None
        name = self.parts[id(layer)][0]
        kind = Kind(x.device.type, x.dtype)
        backend = dispatch.asked(kind) or dispatch.fastest(kind)
        grouped, mask, counted, packing = arrange(x, None, layer.config.scope)
        if packing is not None:

            def part(x: Tensor, mask: Tensor) -> Tensor:
                with token_mask(mask):
                    y = self.compute(layer, x)
                assert y is not None
                return y

            return packing.apply(x, part)
        features = plan.drawn if self.features is None else self.features[name]
        I_in, I_out = None, None
        if features is None:
            I_in = sharing.find(x, mask, grouped.shape, plan.settings.r)
        else:
            I_in, I_out = (index.expand(len(grouped), -1) for index in features)
        entropy = layer.state.entropy_on(x.device)
        inputs = Inputs(
            grouped, layer.matrix(), layer.bias, counted, I_in, I_out, plan.bounds, entropy
        )
        with torch.no_grad():
            if len(layer.deciding()) == 2:
                inputs = self._jointly(layer, inputs, plan.settings)
        literal = backend is dispatch.BACKENDS["reference"]
        if torch.is_grad_enabled() or self.counts is not None or literal:
            y, selected = self._differentiable(name, inputs, own, plan.settings)
        else:
            numbers = LayerGamma(own).in_policy(plan.bounds, plan.settings.r)
            own_layer = Layer(Matrix(inputs.weight), inputs.bias, plan.settings, numbers)
            given = Given(inputs.I_in, inputs.I_out, inputs.energy)
            (y,), selected = backend.run(Call(grouped, (own_layer,), counted, entropy, None, given))
        if I_in is None:
            sharing.remember(x, mask, grouped.shape, selected)
        return y.view(*x.shape[:-1], -1)

    def _jointly(self, layer: Any, inputs: Inputs, settings: Settings) -> Inputs:
        """Add to ``inputs`` of a coupled query or key what it decides together with its peer."""
        query, key = layer.deciding()
        pair, x = layer.coupling, inputs.x.detach()
        held = self._joint
        if held is not None and _same(held, x):
            joint, self._joint = held[2], None
        else:
            joint = coupling.couple(
                x, query.matrix(), key.matrix(), inputs.mask, inputs.I_in,
                settings.r, pair.heads, pair.kv_heads,
            )  # fmt: skip
            self._joint = x, x._version, joint
        place = 0 if layer is query else 1
        energy = joint.energy.clone() if settings.adaptive else None
        I_in, I_out = inputs.I_in, inputs.I_out
        if I_out is None:
            I_in, I_out = joint.features[:, 0], joint.features[:, place + 1]
        return inputs._replace(I_in=I_in, I_out=I_out, H=joint[place], energy=energy)

    def _differentiable(
        self, name: str, inputs: Inputs, own: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        """Select for the layer of that name and compute ``[G, T, d_out]``; return ``I_in``, too."""
        with torch.no_grad():
            chosen = self._selected(inputs, settings)
            I_in, I_out = chosen.I_in, chosen.I_out
            assert I_in is not None and I_out is not None
            if self.counts is not None:
                mask = inputs.mask
                for count, index in zip(self.counts[name], (I_in, I_out), strict=True):
                    flat = (index if mask is None else index[mask.any(1)]).reshape(-1)
                    count.index_add_(0, flat, count.new_ones(len(flat)))
            if name not in self._norms:
                self._norms[name] = norms(inputs.weight)
        return differentiable(chosen, own, settings, self._norms[name]), I_in

    @staticmethod
    def _selected(inputs: Inputs, settings: Settings) -> Inputs:
        """Add to ``inputs`` all that a layer chooses: H, energy, ``I_in`` and ``I_out``."""
        x, mask, I_in, I_out = inputs.x.detach(), inputs.mask, inputs.I_in, inputs.I_out
        H, energy = inputs.H, inputs.energy
        if H is None:
            count = None if mask is None else mask.sum(1).clamp_(min=1)
            H = F.linear(x, inputs.weight)
            s_out, energy = selection.statistics(H, mask, count, settings.adaptive)
            if I_in is None:
                I_in = selection.top_k(selection.statistics(x, mask, count, False)[0], settings.r)
            if I_out is None:
                I_out = selection.top_k(s_out, settings.r)
        return inputs._replace(I_in=I_in, I_out=I_out, H=H, energy=energy)

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


def _same(held: tuple[Tensor, int, Any], x: Tensor) -> bool:
    """Tell whether ``held``, which is kept alive, is ``x``, unchanged."""
    other, version, _ = held
    alike = other.data_ptr() == x.data_ptr() and other.shape == x.shape
    return alike and other.stride() == x.stride() and version == x._version


def norms(weight: Tensor) -> Norms:
    """Return the norms of the rows and columns of W, which is frozen."""
    dtype = selection.accumulation_dtype(weight.dtype)
    rows, columns = (torch.linalg.vector_norm(weight, 2, dim=d, dtype=dtype) for d in (1, 0))
    return rows, columns


def differentiable(
    chosen: Inputs, gamma: Tensor, settings: Settings, weight_norms: Norms
) -> Tensor:
    """Compute the output ``[G, T, d_out]``, differentiable by x and γ (SPEC §6).

    Without a clamp nothing wider than ``[N, r]`` is kept for the backward pass.

    Args:
        chosen: of the layer, with its selection, H and energy; the policy ``[9]`` of the config.
        gamma: float64 without dims, or ``[r]`` for one a column.
        settings: the rest.
        weight_norms: of :func:`norms`.
    """
    x, W, bias, _, I_in, I_out, given, *_ = chosen
    assert I_in is not None and I_out is not None and chosen.H is not None
    if gamma.dim():
        numbers = torch.cat([given[:1], given.new_ones(2), given[3:NUMBERS], gamma])
    else:
        numbers = torch.cat([given[:1], gamma.expand(2), given[3:NUMBERS]])
    products = _products(chosen, settings, weight_norms)
    core, scale, inactive = cores.build(
        products, numbers, chosen.energy, chosen.entropy, chosen.mask, settings
    )
    H, t = _Base.apply(x, chosen.H, W, I_out)
    if inactive is not None:
        t = t.masked_fill(inactive.unsqueeze(1), 0.0)
    factor = scale.view(-1, 1, 1)
    if settings.clamp is None:
        y = H + _Expanded.apply(gradient.mix(t, core * factor), W, I_in)
    else:
        delta = _Expanded.apply(gradient.mix(t, core), W, I_in)
        y = H + (factor * delta.clamp(-settings.clamp, settings.clamp)).to(H.dtype)
    return y if bias is None else y + bias


def _products(chosen: Inputs, settings: Settings, weight_norms: Norms) -> Products:
    """Return what the core asks of W, whose norms are known."""
    x, W, _, _, I_in, I_out, _, _, H, _ = chosen
    assert I_in is not None and I_out is not None and H is not None
    if settings.tau is None or needs_gram_of_columns(settings):
        return matrix_products(x.detach(), W, H, I_in, I_out, None, settings)
    found = matrix_products(x.detach(), W, H, I_in, I_out, None, settings._replace(tau=None))
    rows, columns = weight_norms
    if not needs_gram_of_rows(settings):
        return found._replace(norm_A=rows[I_out], norm_B=columns[I_in])
    chosen_rows = W[I_out].to(rows.dtype)
    return found._replace(gram_A=chosen_rows @ chosen_rows.mT, norm_B=columns[I_in])


class _Base(torch.autograd.Function):
    """Return ``H = x Wᵀ``, which is known, and ``H[:, I_out]``, keeping W and I_out alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, H: Tensor, W: Tensor, I_out: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(W, I_out)
        return H.view_as(H), gather(H, I_out)

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_t: Tensor) -> tuple[Tensor | None, ...]:
        W, I_out = ctx.saved_tensors
        return g.scatter_add(-1, I_out.unsqueeze(1).expand_as(g_t), g_t) @ W, None, None, None


class _Expanded(torch.autograd.Function):
    """Multiply by ``Bᵀ``, ``[G, T, r]`` to ``[G, T, d_out]``, keeping W and I_in alone.

    Tokens that select alike share the columns of W, so B is read by its distinct columns.
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
