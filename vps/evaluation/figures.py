"""The pictures of a report: differences with their intervals, and time against difference."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

from vps.evaluation import summary
from vps.evaluation.comparison import LOWER_IS_BETTER, NO_DIFFERENCE, Analysis, Comparison

COLOURS = {"better": "#1a7f37", "worse": "#b3261e", NO_DIFFERENCE: "#57606a"}
MARKERS = {"better": "^", "worse": "v", NO_DIFFERENCE: "o"}
LONGEST = 44  # characters of a name in a picture
MOST_UNITS = 6  # panels in one picture


def check() -> None:
    """Raise before anything is written where nothing can be drawn.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    if util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("drawing needs matplotlib: pip install 'vps-kernels[plots]'")


def forest(analysis: Analysis, path: Path) -> None:
    """Difference from the baseline and its interval, a panel a task and metric, as PNG."""
    units = dict(list(summary.units(analysis.to_baseline).items())[:MOST_UNITS])
    groups = list(units.values())
    rows = max((len(group) for group in groups), default=1)
    figure = _figure(3.4 + 3.6 * max(1, len(groups)), 1.4 + 0.21 * rows)
    title = analysis.run.title
    _text(figure.suptitle(f"{title}: difference from the baseline", fontsize=10, x=0.01, ha="left"))
    panels = figure.subplots(1, max(1, len(groups)), sharey=True, squeeze=False)[0]
    for axes, ((task, metric), group) in zip(panels, units.items(), strict=False):
        axes.axvline(0, color="black", linewidth=0.8)
        for place, each in enumerate(group):
            _interval(axes, analysis, each, place)
        _text(axes.set_xlabel(f"{_unit(group[0])}, n = {group[0].n}", fontsize=8))
        _text(axes.set_title(summary.unit_name(task, metric), fontsize=9, loc="left"))
        _bare(axes, "x")
    if groups:
        axes = panels[0]
        axes.set_yticks(range(len(groups[0])), [_label(analysis, each) for each in groups[0]])
        for label, each in zip(axes.get_yticklabels(), groups[0], strict=True):
            control = analysis.is_control(each.cell)
            label.set(parse_math=False, fontsize=6.5 if control else 7.5,
                      color="#6e7781" if control else "black")  # fmt: skip
        axes.set_ylim(len(groups[0]) - 0.4, -0.6)
    note = (
        "95 % paired bootstrap intervals, not corrected. Filled: differs after Holm's correction "
        "(▲ better, ▼ worse); open: no difference. Grey names: controls."
    )
    figure.supxlabel(note, fontsize=6.5, color="#57606a", x=0.01, ha="left")
    figure.savefig(path, dpi=140)


def cost(analysis: Analysis, path: Path) -> None:
    """Seconds over those of the baseline against the difference, of the first task, as PNG."""
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    units = summary.units(analysis.to_baseline)
    axes.axhline(0, color="black", linewidth=0.8)
    for (task, metric), group in list(units.items())[:1]:
        for each in group:
            if each.cell not in analysis.cost:
                continue
            x, control = analysis.cost[each.cell], analysis.is_control(each.cell)
            scale = summary.scaled(each)[0]
            y, colour = scale * each.difference, COLOURS[each.verdict]
            axes.plot([x, x], [scale * each.low, scale * each.high], color=colour, linewidth=0.7,
                      alpha=0.25 if control else 0.6)  # fmt: skip
            axes.plot(x, y, MARKERS[each.verdict], color=colour, markersize=4 if control else 6,
                      markerfacecolor="none" if control else colour)  # fmt: skip
        _text(axes.set_ylabel(f"difference from the baseline, {_unit(group[0])}", fontsize=8))
        _text(axes.set_title(summary.unit_name(task, metric), fontsize=9, loc="left"))
    axes.set_xlabel("time ÷ time of the baseline (open: controls)", fontsize=8)
    _bare(axes, "both")
    figure.savefig(path, dpi=140)


def _interval(axes: Any, analysis: Analysis, each: Comparison, place: int) -> None:
    scale, colour = summary.scaled(each)[0], COLOURS[each.verdict]
    control = analysis.is_control(each.cell)
    axes.plot([scale * each.low, scale * each.high], [place, place], color=colour,
              linewidth=0.9 if control else 1.6, alpha=0.5 if control else 1)  # fmt: skip
    filled = each.verdict != NO_DIFFERENCE
    axes.plot(scale * each.difference, place, MARKERS[each.verdict], color=colour,
              markersize=3.5 if control else 5,
              markerfacecolor=colour if filled else "white")  # fmt: skip


def _unit(each: Comparison) -> str:
    text = "points" if each.gained is not None else each.metric
    return f"{text} (lower is better)" if each.metric in LOWER_IS_BETTER else text


def _label(analysis: Analysis, each: Comparison) -> str:
    cell = analysis.cells[each.cell]
    name = each.cell if cell.control is None else summary.control_title(cell)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _text(text: Any) -> None:
    """Names are the user's: a dollar sign begins no formula."""
    text.set_parse_math(False)


def _bare(axes: Any, grid: Any) -> None:
    axes.grid(True, axis=grid, linewidth=0.3)
    axes.tick_params(labelsize=7.5, length=2)
    axes.spines[["top", "right", "left"]].set_visible(False)


def nice_ticks(low: float, high: float, count: int = 5) -> Sequence[float]:
    """Round numbers between two ends, about so many."""
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(count).tick_values(low, high)
    return [float(tick) for tick in ticks if low <= tick <= high]
