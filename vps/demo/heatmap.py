"""What the policy decided in every layer for one prompt, drawn."""

from __future__ import annotations

import math
from pathlib import Path

from vps.matching import layer_index
from vps.statistics import LayerStatistics

PANELS = (
    ("gamma", "scale γ", "γ, no unit"),
    ("rank", "rank", "columns of the update"),
    ("energy", "energy", "mean H², logarithmic"),
    ("relative_size", "relative size of the update", "‖γδ‖ / ‖H‖, percent"),
)


def column_names(names: list[str]) -> list[str]:
    """Shortest ends of ``names`` that tell the layers of a block apart, such as ``q_proj``."""
    depth = 1
    while True:
        ends = [".".join(name.split(".")[-depth:]) for name in names]
        places = {(layer_index(name), end) for name, end in zip(names, ends, strict=True)}
        if len(places) == len(set(names)):
            return ends
        depth += 1


def draw(statistics: list[LayerStatistics], path: Path, subject: str = "one prompt") -> None:
    """Four heat maps, blocks downwards and projections across, as PNG; ``subject`` is its title's.

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
    columns = column_names([entry.name for entry in statistics])
    projections = list(dict.fromkeys(columns))
    blocks = sorted({layer_index(entry.name) or 0 for entry in statistics})
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr]
    figure.suptitle(f"What sharpening decides and does in every layer, over {subject}")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (field, title, unit) in zip(panels, PANELS, strict=True):
        grid = [[math.nan] * len(projections) for _ in blocks]
        for entry, column in zip(statistics, columns, strict=True):
            value = float(getattr(entry, field))
            if field == "energy":
                value = max(value, 1e-30)
            elif field == "relative_size":
                value *= 100
            row = blocks.index(layer_index(entry.name) or 0)
            grid[row][projections.index(column)] = value
        norm: Normalize | None = None
        ticks = None
        if field == "energy":
            norm = LogNorm()
        elif field == "rank":
            ticks = list(range(1, max(1, math.ceil(max(entry.rank for entry in statistics))) + 1))
            norm = BoundaryNorm([0.5, *(rank + 0.5 for rank in ticks)], 256)
        image = axes.imshow(grid, aspect="auto", cmap="viridis", norm=norm)
        axes.set_title(title)
        axes.set_xticks(
            range(len(projections)), projections, rotation=45, ha="right", rotation_mode="anchor"
        )
        axes.set_yticks(range(len(blocks)), [str(block) for block in blocks])
        if len(blocks) > 12:
            axes.yaxis.set_major_locator(MaxNLocator(7, integer=True))
        figure.colorbar(image, ax=axes, label=unit, ticks=ticks)
    panels[0].set_ylabel("block of the model")
    figure.savefig(path, dpi=110)
