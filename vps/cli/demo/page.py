"""Write the demo's page: one HTML file without scripts, that asks for nothing from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vps import files
from vps.cli.demo import calibrated, refinements
from vps.cli.demo.heatmap import column_names
from vps.evaluation.templates import render
from vps.model.matching import layer_index
from vps.model.statistics import LayerStatistics

if TYPE_CHECKING:
    from vps.cli.demo.comparison import DemoRun

TEMPLATE = Path(__file__).with_name("report.html")
# Of matplotlib's viridis: as light as it is large, also in print and to the colour-blind.
RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
SIDE = 20  # of a cell, in units of the drawing


@dataclass(frozen=True)
class Cell:
    """Hold one layer's place in the map, its colour, and its words."""

    x: int
    y: int
    colour: str
    words: str


@dataclass(frozen=True)
class HeatMap:
    """Hold the map of one number: blocks across, projections down."""

    cells: tuple[Cell, ...]
    blocks: tuple[int, ...]
    projections: tuple[str, ...]
    low: float
    high: float


def colour(share: float) -> str:
    """Return the colour of a number between 0 and 1."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    step = min(int(place), len(RAMP) - 2)
    mixed = (
        round(a + (b - a) * (place - step)) for a, b in zip(RAMP[step], RAMP[step + 1], strict=True)
    )
    return "#" + "".join(f"{each:02x}" for each in mixed)


def heat_map(statistics: list[LayerStatistics]) -> HeatMap:
    """Lay out the relative size of every layer's update, in percent of its output."""
    ends = column_names([entry.name for entry in statistics])
    projections = tuple(dict.fromkeys(ends))
    blocks = tuple(sorted({layer_index(entry.name) or 0 for entry in statistics}))
    values = [100 * entry.relative_size for entry in statistics]
    finite = [value for value in values if value == value] or [0.0]
    low, high = min(finite), max(finite)
    cells = []
    for entry, end, value in zip(statistics, ends, values, strict=True):
        block = layer_index(entry.name) or 0
        known = value == value
        share = (value - low) / (high - low) if high > low else 0.0
        cells.append(
            Cell(
                blocks.index(block) * SIDE,
                projections.index(end) * SIDE,
                colour(share) if known else "none",
                f"block {block}, {end}: "
                + (f"{value:.1f} %, γ {entry.gamma:.2f}, rank {entry.rank:.0f}" if known else "–"),
            )
        )
    return HeatMap(tuple(cells), blocks, projections, low, high)


def write_page(run: DemoRun) -> None:
    """Write ``run.report`` as a whole or not at all."""
    text = render(
        TEMPLATE,
        run=run,
        states=calibrated.states,
        tokens_refined=refinements.NEW_TOKENS,
        tokens_calibrated=calibrated.NEW_TOKENS,
        map=heat_map(run.statistics),
        side=SIDE,
        ramp=[colour(step / 4) for step in range(5)],
        fastest=max(each.rate for each in run.speed.models),
    )
    files.replace(run.report, text)
