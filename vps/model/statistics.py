"""Observe what the policy decides in every layer in a forward pass, and how large the update is.

``relative_size = ‖y − b − H‖ / ‖H‖`` over all tokens of the pass, from the actual output y.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vps import masking
from vps.algorithm import policy, selection
from vps.masking import group
from vps.model.generation import input_device
from vps.model.patching import require_layers


@dataclass(frozen=True)
class LayerStatistics:
    """The decision and its effect in one layer, averaged over its groups of tokens.

    Args:
        name: name of the layer.
        sigma: σ, from 0 to 1 (SPEC §5).
        gamma: γ.
        rank: rank of the update.
        energy: mean of the squares of H.
        relative_size: norm of the update over the norm of H.
    """

    name: str
    sigma: float
    gamma: float
    rank: float
    energy: float
    relative_size: float


@dataclass(frozen=True)
class Observation:
    """What one call of a layer showed.

    Args:
        name: name of the layer.
        layer: the layer.
        energy: energies ``[G]`` of the groups with a counted token.
        size_H: norm of H over all tokens.
        size_update: norm of the update over all tokens.
    """

    name: str
    layer: Any
    energy: Tensor
    size_H: Tensor
    size_update: Tensor

    def decided(self) -> LayerStatistics:
        """Return what the layer's present config and policy state decide for the energies."""
        config, state = self.layer.config, self.layer.state
        d_out, d_in = min(layer.widths for layer in self.layer.deciding())
        relative = float(self.size_update / self.size_H) if self.size_H > 0 else 0.0
        energy = float(self.energy.mean()) if len(self.energy) else 0.0
        own = self.layer.gamma
        settings = policy.settings(config, self.layer.gradient, d_in, d_out, own is not None)
        entropy = state.signals(self.energy.device)
        sigma = policy.sigma(self.energy.clone(), entropy)
        average = float(sigma.mean()) if len(sigma) else 0.0
        if settings is None or not len(sigma) or own is not None and own.is_zero:  # γ is 0
            return LayerStatistics(self.name, average, 0.0, 0, energy, relative)
        numbers = self.energy.new_tensor(policy.bounds(config))
        settings = settings._replace(adaptive=True)
        decision = policy.decide(numbers, self.energy.clone(), entropy, len(sigma), settings)
        assert decision.inactive is not None
        rank = float((~decision.inactive).sum(1).to(self.energy.dtype).mean())
        gamma = float((decision.gamma if own is None else own.numbers).mean())
        return LayerStatistics(self.name, average, gamma, rank, energy, relative)


@contextmanager
def observe(model: nn.Module) -> Iterator[list[Observation]]:
    """Collect an :class:`Observation` of every sharpened layer that runs inside, in that order.

    It costs each layer a second base product.

    Args:
        model: a sharpened model.

    Yields:
        The list, which is filled as layers run.

    Raises:
        ValueError: no sharpened layer in the model.
        RuntimeError: at the end of a block in which no sharpened layer ran.
    """
    layers = require_layers(model, "observe")
    seen: list[Observation] = []
    handles = [
        layer.register_forward_hook(partial(_observed, seen, name, layer))
        for name, layer in layers.items()
    ]
    try:
        yield seen
        if not seen:
            raise RuntimeError(
                "vps.model.statistics.observe: no sharpened layer was seen; run the model inside "
                "the block, uncompiled if torch.compile compiled it before"
            )
    finally:
        for handle in handles:
            handle.remove()


def measure(model: nn.Module, inputs: dict[str, Tensor]) -> list[LayerStatistics]:
    """Run one forward pass and return what the policy decides in every layer.

    Args:
        model: a sharpened model.
        inputs: arguments of the forward, such as ``input_ids`` ``[B, T]``; they are moved to the
            model's device.

    Returns:
        The decision and its effect in each layer, in the order in which layers run.
    """
    with observe(model) as seen, torch.inference_mode():
        device = input_device(model)
        model(**{name: tensor.to(device) for name, tensor in inputs.items()})
        return [observation.decided() for observation in seen]


@torch.no_grad()
def _observed(
    seen: list[Observation],
    name: str,
    layer: Any,
    module: nn.Module,
    args: tuple[Tensor, ...],
    y: Tensor,
) -> None:
    """Add an :class:`Observation` of a call, as a forward hook."""
    x = args[0]
    H = layer.base_product(x)
    own = [H if one is layer else one.base_product(x) for one in layer.deciding()]
    products = H if len(own) == 1 else torch.cat(own, -1)
    dims, mask, packing = masking.groups_of(x, layer.config.scope)
    if packing is None:
        grouped = group(products, dims, layer.config.scope)
        counted = None if mask is None else mask.to(x.device).reshape(grouped.shape[:-1])
        energy = _energy(grouped, counted)
    else:
        parts = zip(packing.take(products), packing.parts, strict=True)
        energy = torch.cat([_energy(values, part.counted) for values, part in parts])
    if layer.matrix() is None:
        update = layer.whole(y) - layer.whole(layer.plain_output(x))
    else:
        update = y - H if layer.bias is None else y - H - layer.bias
    sizes = (torch.linalg.vector_norm(z, dtype=energy.dtype) for z in (H, update))
    seen.append(Observation(name, layer, energy, *sizes))


def _energy(grouped: Tensor, counted: Tensor | None) -> Tensor:
    """Return energies ``[G]`` of the groups ``[G, T, d_out]`` that have a counted token."""
    energy = selection.counted_statistics(grouped, counted, True)[1]
    assert energy is not None
    return energy if counted is None else energy[counted.any(1)]


_observed._torchdynamo_disable = True  # type: ignore[attr-defined]  # as in capture
