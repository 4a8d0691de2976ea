"""The forms that are fitted: sharpening, and what it has to beat with as many numbers.

A form holds its numbers, all 0 at first, which leaves the model as it is; inside :meth:`applied`
the patched model computes with them, differentiably.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vps.algorithm import coupling, selection
from vps.algorithm.policy import LayerGamma, Settings
from vps.algorithm.torch_backend import Inputs
from vps.backends import dispatch, sharing
from vps.coupled import couple_by
from vps.fitting.update import Norms, Selection, norms, sharpened
from vps.functional import arrange, plan_for, run
from vps.masking import token_mask
from vps.model.calibration import columns_of
from vps.model.patching import sharpened_layers

Features = tuple[Tensor, Tensor]  # I_in and I_out, [r]
Compute = Callable[[Any, Tensor, Tensor, Tensor | None], Tensor | None]


class Form:
    """One float64 tensor of numbers ``[n]``, a number a layer or one a column.

    Args:
        model: a patched model.
        names: the layers that get numbers; the others stay plain.
        by_column: as many numbers a layer as its update can have columns.
    """

    name = "form"

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
        """What an optimizer changes."""
        return [self.values]

    @property
    def scope(self) -> str:
        """Under which the layers count their tokens."""
        scope: str = next(iter(self.layers.values())).config.scope
        return scope

    @property
    def count(self) -> int:
        """How many numbers are fitted."""
        return len(self.values)

    def own(self, layer: Any) -> Tensor | None:
        """The numbers of a layer, without dims or ``[r]``; ``None`` where it has none."""
        part = self.parts.get(id(layer))
        if part is None:
            return None
        own = self.values[part[1]]
        return own if self.by_column else own[0]

    def compute(self, layer: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor | None:
        """Output of ``layer`` for x ``[..., d_in]``; ``None`` for that of its base."""
        raise NotImplementedError

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the numbers inside."""
        try:
            for layer in self.layers.values():
                layer.sharpen = _Bound(self.compute, layer)
            yield
        finally:
            for layer in self.layers.values():
                vars(layer).pop("sharpen", None)

    def state(self) -> list[list[float]]:
        """The numbers, for JSON."""
        return [parameter.detach().flatten().tolist() for parameter in self.parameters]

    @torch.no_grad()
    def set_state(self, state: list[list[float]]) -> None:
        """Take the numbers of :meth:`state`."""
        for parameter, values in zip(self.parameters, state, strict=True):
            parameter.copy_(torch.tensor(values, dtype=torch.float64).view_as(parameter))


class _Bound:
    """What stands in for a layer's method ``sharpen``."""

    def __init__(self, compute: Compute, layer: Any) -> None:
        self.compute = compute
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor | None:
        return self.compute(self.layer, x, self.layer.matrix(), self.layer.bias)


class Plain(Form):
    """The model without sharpening; its numbers do nothing."""

    name = "plain"

    def compute(self, layer: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor | None:
        return None


class Scale(Form):
    """``(1 + a) · H``; with a number a column, as many blocks of output features have their own."""

    name = "scale"

    def compute(self, layer: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor | None:
        own = self.own(layer)
        if own is None:
            return None
        if self.by_column:
            index = torch.arange(len(W), device=W.device) * len(own) // len(W)
            own = own[index]
        y = F.linear(x, W) * (1 + own).to(x.dtype)
        return y if bias is None else y + bias


class Sharpening(Form):
    """γ of the update, in one of three ways to select its features.

    Args:
        model, names, by_column: as for :class:`Form`.
        features: of every layer, in place of those selected for the input.
        name: of the form.
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
        """γ by name of every sharpened layer, 0 where it has none."""
        found: dict[str, float | tuple[float, ...]] = dict.fromkeys(self.layers, 0.0)
        for name, part in self.parts.values():
            own = tuple(self.values[part].tolist())
            found[name] = own if self.by_column else own[0]
        return found

    def compute(self, layer: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor | None:
        own = self.own(layer)
        if own is None:
            return None
        d_out, d_in = min(one.widths for one in layer.deciding())
        factor = layer.state.factor()
        plan = plan_for(layer.config, layer.gradient, factor, d_out, d_in, x.device, x.dtype, True)
        assert plan is not None
        name = self.parts[id(layer)][0]
        backend = dispatch.asked(x) or plan.fastest
        grouped, mask, counted, packing = arrange(x, None, layer.config.scope)
        if packing is not None:

            def part(x: Tensor, mask: Tensor) -> Tensor:
                with token_mask(mask):
                    y = self.compute(layer, x, W, bias)
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
        inputs = Inputs(grouped, W, bias, counted, I_in, I_out, plan.bounds, entropy)
        with torch.no_grad():
            if len(layer.deciding()) == 2:
                inputs = self._jointly(layer, inputs, plan.settings, backend)
        if torch.is_grad_enabled() or self.counts is not None or backend == "reference":
            y, selected = self._differentiable(name, inputs, own, plan.settings)
        else:
            numbers = LayerGamma(own).in_policy(plan.bounds, plan.settings.r)
            y, selected = run(backend, inputs._replace(policy=numbers), plan.settings, ())
        if I_in is None:
            sharing.remember(x, mask, grouped.shape, selected)
        return y.view(*x.shape[:-1], len(W))

    def _jointly(self, layer: Any, inputs: Inputs, settings: Settings, backend: str) -> Inputs:
        """``inputs`` of a coupled query or key, with what it decides together with its peer."""
        query, key = layer.deciding()
        pair, x = layer.coupling, inputs.x.detach()
        held = self._joint
        if held is not None and _same(held, x):
            joint, self._joint = held[2], None
        else:
            name = "torch" if backend == "reference" else backend
            joint = couple_by(
                name, x, query.matrix(), key.matrix(), inputs.mask, inputs.I_in,
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
        """Output ``[G, T, d_out]`` of the layer of that name, and ``I_in`` ``[G, r]``."""
        with torch.no_grad():
            chosen = self._selected(inputs, settings)
            if self.counts is not None:
                mask = inputs.mask
                for count, index in zip(self.counts[name], chosen[2:], strict=True):
                    flat = (index if mask is None else index[mask.any(1)]).reshape(-1)
                    count.index_add_(0, flat, count.new_ones(len(flat)))
            if name not in self._norms:
                self._norms[name] = norms(inputs.weight)
        return sharpened(inputs, chosen, own, settings, self._norms[name]), chosen.I_in

    @staticmethod
    def _selected(inputs: Inputs, settings: Settings) -> Selection:
        """What a layer chooses where it is not known."""
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
        assert I_in is not None and I_out is not None
        return Selection(H, energy, I_in, I_out)

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
    """Whether ``held``, which is kept alive, is ``x``, unchanged."""
    other, version, _ = held
    alike = other.data_ptr() == x.data_ptr() and other.shape == x.shape
    return alike and other.stride() == x.stride() and version == x._version


def random_features(form: Form, seed: int) -> dict[str, Features]:
    """Features of every layer of ``form`` drawn by ``seed``, others in every layer."""
    found = {}
    for number, name in enumerate(form.names):
        layer = form.layers[name]
        d_out, d_in = layer.widths
        own = seed * 1_000_003 + number
        drawn = selection.random_features(own, d_in, d_out, columns_of(layer))
        found[name] = tuple(torch.tensor(index, device=form.values.device) for index in drawn)
    return found  # type: ignore[return-value]


def frequent_features(form: Form, counts: Mapping[str, Features]) -> dict[str, Features]:
    """The features that every layer selected most often, best first, ties to the lower index."""
    found = {}
    for name in form.names:
        r = columns_of(form.layers[name])
        found[name] = tuple(
            torch.sort(count, descending=True, stable=True).indices[:r] for count in counts[name]
        )
    return found  # type: ignore[return-value]


def matrix_of(name: str, layer: Any) -> Tensor:
    """``W`` ``[d_out, d_in]`` of a layer.

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
