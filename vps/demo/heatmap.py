"""What the policy decided in every layer for one prompt, measured by the reference and drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vps import reference
from vps.matching import layer_index
from vps.patching import sharpened_layers

PANELS = (
    ("gamma", "scale γ"),
    ("rank", "rank"),
    ("energy", "log10 energy, mean H²"),
    ("relative_size", "‖γδ‖ / ‖H‖ in percent"),
)


@dataclass(frozen=True)
class LayerStatistics:
    """Decision and effect in one layer; ``relative_size`` is ``‖γδ‖/‖H‖`` over all tokens."""

    name: str
    gamma: float
    rank: int
    energy: float
    relative_size: float

    @property
    def projection(self) -> str:
        """Last part of the layer's name."""
        return self.name.rsplit(".", 1)[-1]


def measure(model: Any, inputs: dict[str, Tensor]) -> list[LayerStatistics]:
    """Run one forward pass and recompute every layer by the reference, in the order of use."""
    statistics: list[LayerStatistics] = []

    def observe(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            result = reference.vps_linear(args[0], layer.weight, layer.bias, config=layer.config)
            group = result.groups[0]
            size = group.gamma * group.delta.norm() / result.H.norm()
            statistics.append(
                LayerStatistics(name, group.gamma, group.rank, group.energy, float(size))
            )

        return hook

    layers = sharpened_layers(model)
    handles = [layer.register_forward_hook(observe(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    return statistics


def draw(statistics: list[LayerStatistics], path: Path) -> None:
    """Four heat maps, blocks downwards and projections across, as PNG.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ModuleNotFoundError(
            "drawing needs matplotlib: pip install 'vps-kernels[plots]'"
        ) from None
    projections = list(dict.fromkeys(entry.projection for entry in statistics))
    blocks = sorted({layer_index(entry.name) or 0 for entry in statistics})
    figure = Figure(figsize=(14, 7), layout="constrained")
    for axes, (field, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        grid = [[math.nan] * len(projections) for _ in blocks]
        for entry in statistics:
            value = float(getattr(entry, field))
            if field == "energy":
                value = math.log10(max(value, 1e-30))
            elif field == "relative_size":
                value *= 100
            row = blocks.index(layer_index(entry.name) or 0)
            grid[row][projections.index(entry.projection)] = value
        image = axes.imshow(grid, aspect="auto", cmap="viridis")
        axes.set_title(title)
        axes.set_xticks(range(len(projections)), projections, rotation=60, ha="right")
        axes.set_ylabel("block")
        figure.colorbar(image, ax=axes, shrink=0.7)
    figure.savefig(path, dpi=110)
