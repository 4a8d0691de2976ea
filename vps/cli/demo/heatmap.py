"""Draw what the policy decided in every layer for one prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from vps.model.matching import layer_index
from vps.model.statistics import LayerStatistics

PANELS = (
    ("gamma", "scale γ", "γ, no unit"),
    ("rank", "rank", "columns of the update"),
    ("energy", "energy", "mean H², logarithmic"),
    ("relative_size", "relative size of the update", "‖γδ‖ / ‖H‖, percent"),
)


def column_names(names: list[str]) -> list[str]:
    """Shorten ``names`` to ends that tell the layers of a block apart, such as ``q_proj``."""
    depth = 1
    while True:
        ends = [".".join(name.split(".")[-depth:]) for name in names]
        places = {(layer_index(name), end) for name, end in zip(names, ends, strict=True)}
        if len(places) == len(set(names)):
            return ends
        depth += 1


@dataclass(frozen=True)
class Panel:
    """Hold one heat map: title, unit, and a value of every layer.

    Where it is ``centred``, colours go both ways from 0.
    ``scale`` is ``"linear"``, ``"logarithmic"`` or ``"steps"``, integers from 1.
    """

    title: str
    unit: str
    values: list[float]
    scale: str = "linear"
    centred: bool = False


def draw(statistics: list[LayerStatistics], path: Path, subject: str = "one prompt") -> None:
    """Draw four heat maps of one prompt, named ``subject`` in their title, as PNG.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    panels = []
    for field, title, unit in PANELS:
        values = [float(getattr(entry, field)) for entry in statistics]
        scale = {"energy": "logarithmic", "rank": "steps"}.get(field, "linear")
        if field == "energy":
            values = [max(value, 1e-30) for value in values]
        elif field == "relative_size":
            values = [100 * value for value in values]
        panels.append(Panel(title, unit, values, scale))
    title = f"What sharpening decides and does in every layer, over {subject}"
    draw_panels([entry.name for entry in statistics], panels, path, title)


def draw_panels(names: list[str], panels: list[Panel], path: Path, title: str) -> None:
    """Draw values of the layers ``names``, blocks downwards and projections across, as PNG.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    try:
        from matplotlib.colors import BoundaryNorm, LogNorm, Normalize
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ModuleNotFoundError(
            "drawing needs matplotlib: pip install 'vps-kernels[plots]'"
        ) from None
    columns = column_names(names)
    projections = list(dict.fromkeys(columns))
    blocks = sorted({layer_index(name) or 0 for name in names})
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr,call-arg]
    figure.suptitle(title)
    all_axes = figure.subplots(1, len(panels), sharey=True)
    for axes, panel in zip(all_axes, panels, strict=True):
        grid = [[math.nan] * len(projections) for _ in blocks]
        for name, column, value in zip(names, columns, panel.values, strict=True):
            grid[blocks.index(layer_index(name) or 0)][projections.index(column)] = value
        norm: Normalize | None = None
        ticks = None
        if panel.scale == "logarithmic":
            norm = LogNorm()
        elif panel.scale == "steps":
            ticks = list(range(1, max(1, math.ceil(max(panel.values))) + 1))
            norm = BoundaryNorm([0.5, *(rank + 0.5 for rank in ticks)], 256)
        elif panel.centred:
            largest = max((abs(value) for value in panel.values if math.isfinite(value)), default=0)
            norm = Normalize(-largest or -1e-30, largest or 1e-30)
        colours = "RdBu_r" if panel.centred else "viridis"
        image = axes.imshow(grid, aspect="auto", cmap=colours, norm=norm)
        axes.set_title(panel.title)
        axes.set_xticks(
            range(len(projections)), projections, rotation=45, ha="right", rotation_mode="anchor"
        )
        axes.set_yticks(range(len(blocks)), [str(block) for block in blocks])
        if len(blocks) > 12:
            axes.yaxis.set_major_locator(MaxNLocator(7, integer=True))
        figure.colorbar(image, ax=axes, label=panel.unit, ticks=ticks)
    all_axes[0].set_ylabel("block of the model")
    figure.savefig(path, dpi=110)
