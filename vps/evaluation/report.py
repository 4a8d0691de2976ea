"""Write the report of a run: Markdown, CSV, two pictures, and one page that needs nothing else."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

from vps import files
from vps.evaluation import summary
from vps.evaluation.comparison import (
    LOWER_IS_BETTER,
    NO_DIFFERENCE,
    Analysis,
    Comparison,
    analyse,
)
from vps.evaluation.runs import read_run
from vps.evaluation.templates import render

FILES = ("report.md", "report.csv", "forest.png", "cost.png", "report.html")
COLOURS = {"better": "#1a7f37", "worse": "#b3261e", NO_DIFFERENCE: "#57606a"}
MARKERS = {"better": "^", "worse": "v", NO_DIFFERENCE: "o"}
LONGEST = 44  # characters of a name in a picture
MOST_UNITS = 6  # panels in one picture

Ends = tuple[float, float]  # of the range that a picture shows


def write_report(
    folder: Path, out: Path | None = None, *, without_controls: bool = False, resamples: int = 9999
) -> Analysis:
    """Write all of :data:`FILES` for the run in ``folder``.

    Args:
        folder: of ``vps ablate``, finished or not.
        out: where to; the same folder when ``None``.
        without_controls: show cells whose controls are not finished too.
        resamples: of the bootstrap.

    Raises:
        RunError: no run in the folder, or none that can be compared.
        ModuleNotFoundError: scipy or matplotlib is missing.
        OSError: a file cannot be written.
    """
    if util.find_spec("matplotlib") is None:  # before anything is written
        raise ModuleNotFoundError("drawing needs matplotlib: pip install 'vps-kernels[plots]'")
    analysis = analyse(read_run(folder), without_controls=without_controls, resamples=resamples)
    out = folder if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    forest(analysis, out / "forest.png")
    cost(analysis, out / "cost.png")
    files.replace(out / "report.csv", csv_text(analysis))
    for name in ("report.html", "report.md"):
        files.replace(out / name, _filled(name, analysis))
    return analysis


def _filled(name: str, analysis: Analysis) -> str:
    return render(
        name,
        analysis=analysis,
        run=analysis.run,
        asked=[c for c in analysis.run.cells if c.config is not None and c.control is None],
        words=summary.summarise(analysis),
        s=summary,
        cost=_cost_points(analysis),
        range_of=_range_of,
        place=_place,
        ticks=_ticks,
        nan=math.nan,
    )


def csv_text(analysis: Analysis) -> str:
    """Write every comparison as a row, with the settings of its cell."""
    text = io.StringIO()
    fields = [field.name for field in dataclasses.fields(Comparison)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["family", "control", *fields, "verdict", "cost", "scope", "settings"])
    families: Sequence[tuple[str, Sequence[Comparison]]] = (
        ("baseline", analysis.to_baseline),
        ("control", analysis.to_controls),
    )
    for family, comparisons in families:
        for each in comparisons:
            cell = analysis.cells[each.cell]
            config = cell.config
            values = [getattr(each, name) for name in fields]
            writer.writerow(
                [
                    family,
                    cell.control or "",
                    *("" if value is None else _safe(value) for value in values),
                    each.verdict,
                    analysis.cost.get(each.cell, ""),
                    "" if config is None else config.scope,
                    "" if config is None else _safe(summary.settings_of(config)),
                ]
            )
    return text.getvalue()


def _safe(value: object) -> object:
    """Mark text that a spreadsheet would take for a formula."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value


def _range_of(group: Sequence[Comparison]) -> Ends:
    """Return the range of a forest: all intervals and 0, with a margin."""
    values = [0.0]
    for each in group:
        values += [v for v in (each.low, each.high, each.difference) if math.isfinite(v)]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.01
    return low - margin, high + margin


def _place(value: float, ends: Ends, width: float = 240) -> str:
    """Say where in a row of a forest a value is."""
    low, high = ends
    return f"{width * (value - low) / (high - low):.1f}"


def _ticks(ends: Ends, group: Sequence[Comparison]) -> list[tuple[str, str]]:
    """Return places and names of the marks of a forest's axis."""
    scale, digits = summary.scaled(group[0])
    return [
        (
            _place(tick / scale, ends),
            summary.number(tick, 0 if digits == 1 and tick == int(tick) else 2, True),
        )
        for tick in _nice_ticks(ends[0] * scale, ends[1] * scale, 4)
    ]


def _nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers between two ends."""
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(count).tick_values(low, high)
    return [float(tick) for tick in ticks if low <= tick <= high]


def _cost_points(analysis: Analysis) -> dict[str, Any] | None:
    """Place time against difference of the first task on 640 by 360; ``None`` without any."""
    units = summary.units(analysis.to_baseline)
    if not units or not analysis.cost:
        return None
    (task, metric), group = next(iter(units.items()))
    group = [each for each in group if each.cell in analysis.cost]
    scale = summary.scaled(group[0])[0]
    low, high = (scale * end for end in _range_of(group))
    most = 1.08 * max([1.0, *(analysis.cost[each.cell] for each in group)])

    def x(value: float) -> float:
        return round(56 + 572 * value / most, 1)

    def y(value: float) -> float:
        return round(12 + 320 * (high - value) / (high - low), 1)

    digits = 0 if high - low > 5 else 2
    marks = [
        (x(analysis.cost[each.cell]), y(scale * each.difference), each, control)
        for control in (True, False)
        for each in group
        if analysis.is_control(each.cell) == control
    ]
    return {
        "name": summary.unit_name(task, metric),
        "unit": "points" if group[0].gained is not None else metric,
        "rows": [
            (y(tick), summary.number(tick, digits, True), abs(tick) < 1e-12)
            for tick in _nice_ticks(low, high, 6)
        ],
        "columns": [(x(tick), f"{tick:.4g}") for tick in _nice_ticks(0, most, 6)],
        "marks": marks,
    }


def forest(analysis: Analysis, path: Path) -> None:
    """Draw differences from the baseline with intervals, a panel a task and metric, as PNG."""
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
    """Draw time over that of the baseline against the difference, of the first task, as PNG."""
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
    """Let a dollar sign begin no formula: names are the user's."""
    text.set_parse_math(False)


def _bare(axes: Any, grid: Any) -> None:
    axes.grid(True, axis=grid, linewidth=0.3)
    axes.tick_params(labelsize=7.5, length=2)
    axes.spines[["top", "right", "left"]].set_visible(False)
