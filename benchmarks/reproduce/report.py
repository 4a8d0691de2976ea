"""Write what the study found: every comparison, the paper's selection resampled, and a picture."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reproduce import protocol
from benchmarks.reproduce.findings import (
    COUPLING,
    MARGINS,
    NULLS,
    PLAIN,
    Finding,
    findings,
)
from benchmarks.reproduce.measures import ACCURACY, BEST, EXACT, LOSS
from benchmarks.reproduce.protocol import Gain
from vps import files
from vps.evaluation.confidence import ORDERS
from vps.evaluation.grid import BASELINE
from vps.evaluation.runs import Run, read_run

FORMAT = "vps-reproduction-1"
UNITS = {  # by metric: how it is called, the factor of what is shown, and the unit of differences
    ACCURACY: ("choice questions", 100, "points"),
    EXACT: ("generated answers", 100, "points"),
    LOSS: ("prose, bits a token", 1 / math.log(2), "bits"),
}
PARTS = ("main", "settings", "generated", "loop")
NOISE = "Gaussian noise on the margins"


def write_report(folder: Path) -> str:
    """Write ``findings.json``, ``report.md`` and ``forest.png`` of the finished parts in a folder.

    Returns:
        The text of ``report.md``.
    """
    runs = {name: read_run(folder / name) for name in PARTS if (folder / name).is_dir()}
    runs = {name: run for name, run in runs.items() if len(run.finished) == len(run.cells)}
    found = {name: findings(run) for name, run in runs.items()}
    selection = {
        name: {order: selected(run, order) for order in ORDERS}
        for name, run in runs.items()
        if name in ("main", "loop")
    }
    values = {
        "format": FORMAT,
        "parts": {
            name: {
                "settings": run.definition,
                "facts": run.finished[0].facts,
                "seconds": sum(record.seconds for record in run.finished.values()),
                "kinds": kinds(run),
                "findings": [as_dict(each) for own in found[name].values() for each in own],
                "selected": {
                    order: {arm: dataclasses.asdict(gain) for arm, gain in gains.items()}
                    for order, gains in selection.get(name, {}).items()
                },
            }
            for name, run in runs.items()
        },
    }
    files.replace(folder / "findings.json", json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    text = "\n".join(
        line
        for name, run in runs.items()
        for line in section(run, found[name], selection.get(name, {}))
    )
    files.replace(folder / "report.md", text)
    if found:
        draw(found, folder / "forest.png")
    return text


def as_dict(found: Finding) -> dict[str, Any]:
    """Return plain values for JSON, the verdict included."""
    return dataclasses.asdict(found) | {"verdict": found.verdict}


def kinds(run: Run) -> dict[str, dict[str, float]]:
    """Return the mean of every cell by task and metric."""
    return {
        run.cells[index].name: {
            f"{task}, {metric}": round(mean, 4) for (task, metric), mean in record.means.items()
        }
        for index, record in run.finished.items()
    }


def selected(run: Run, order: str) -> dict[str, Gain]:
    """Return what every cell gains on the third of resampled pools that ``order`` keeps, by arm.

    An arm is a cell, with ``", best"`` where the labels choose among iterations; the last arms add
    noise of the spread by which the first cell moves margins.
    """
    plain = {
        (each.task, each.document): each
        for each in run.finished[0].outcomes
        if each.metric == ACCURACY
    }
    margins = [float(each.margin or 0.0) for each in plain.values()]
    arms: dict[str, list[float]] = {}
    moved: list[float] = []
    for index, record in run.finished.items():
        for metric, suffix in ((ACCURACY, ""), (BEST, ", best")):
            own = {(o.task, o.document): o for o in record.outcomes if o.metric == metric}
            if own and index:
                arms[run.cells[index].name + suffix] = [own[key].value for key in plain]
                moved = moved or [
                    float(own[key].margin or 0.0) - m for key, m in zip(plain, margins, strict=True)
                ]
    looped = any(name.endswith(", best") for name in arms)
    noise = protocol.without_meaning(
        margins, float(np.std(moved)), order, iterations=protocol.ITERATIONS if looped else 2
    )
    found = protocol.resampled(margins, arms, order)
    found[NOISE] = noise["last"]
    if looped:
        found[f"{NOISE}, best"] = noise["best"]
    return found


def section(
    run: Run, found: Mapping[str, Sequence[Finding]], kept: Mapping[str, Mapping[str, Gain]]
) -> Iterable[str]:
    """Yield the lines of one part, in Markdown."""
    facts = run.finished[0].facts
    yield f"## {run.title}\n"
    yield (
        f"{facts['cpu']}, {facts['instructions']}, {facts['threads']} threads; torch "
        f"{facts['torch']}; commit {facts['commit']}; seed {run.definition['seed']}.\n"
    )
    for metric, every in found.items():
        title, factor, unit = UNITS[metric]
        yield f"### {title}\n"
        yield (
            f"| | against | n | there | here | difference, {unit} | gained, lost | p | "
            f"p of ±{MARGINS[metric] * factor:.2g} | verdict | detectable |"
        )
        yield "|---" * 11 + "|"
        for each in every:
            own = each.comparison
            flips = "" if own.gained is None else f"+{own.gained} −{own.lost}"
            low, high = (factor * end for end in (own.low, own.high))
            yield (
                f"| {own.cell} | {own.against} | {own.n} | {factor * own.base:.2f} | "
                f"{factor * own.value:.2f} | {factor * own.difference:+.2f} "
                f"[{low:+.2f}, {high:+.2f}] | {flips} | {own.corrected:.3g} | "
                f"{each.equivalent:.3g} | {each.verdict} | {factor * each.detectable:.2g} |"
            )
        yield ""
    for order, gains in kept.items():
        yield (
            f"### the {order} third, in {protocol.RESAMPLES} resamples of the pool\n\n"
            "| | gain in points, mean [95 %] |\n|---|---|"
        )
        for arm, gain in gains.items():
            mean, low, high = (100 * each for each in (gain.mean, gain.low, gain.high))
            yield f"| {arm} | {mean:+.1f} [{low:+.1f}, {high:+.1f}] |"
        yield ""


def draw(found: Mapping[str, Mapping[str, Sequence[Finding]]], path: Path) -> None:
    """Draw the difference of every cell and control from the plain model, with 95 %, as PNG.

    The shaded band is the margin of equivalence. Parts share the axis of their metric.
    """
    from matplotlib.figure import Figure

    rows: dict[str, list[Finding]] = {}
    for name, metrics in found.items():
        for metric, every in metrics.items():
            shown = [each for each in every if each.family in (PLAIN, NULLS, COUPLING)]
            if name != "loop" and shown:
                rows.setdefault(metric, []).extend(shown)
    sizes = [len(every) for every in rows.values()]
    figure = Figure(figsize=(9, 1.2 * len(rows) + 0.22 * sum(sizes)), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, (metric, every) in zip(panels, rows.items(), strict=True):
        title, factor, unit = UNITS[metric]
        axes.axvspan(*(factor * MARGINS[metric] * sign for sign in (-1, 1)), color="#eaeef2")
        axes.axvline(0, color="black", linewidth=0.8)
        for place, each in enumerate(every):
            own = each.comparison
            color = "#57606a" if each.family == NULLS else "#0b57d0"
            ends = [factor * own.low, factor * own.high]
            axes.plot(ends, [place, place], color=color, linewidth=1.4)
            axes.plot(factor * own.difference, place, "o", color=color, markersize=4)
        labels = [
            each.comparison.cell
            + ("" if each.comparison.against == BASELINE else f" − {each.comparison.against}")
            + f"  (n = {each.comparison.n})"
            for each in every
        ]
        axes.set_yticks(range(len(every)), labels, fontsize=7)
        axes.invert_yaxis()
        axes.set_title(f"{title}: difference from the plain model, {unit}", fontsize=10, loc="left")
        axes.grid(True, axis="x", linewidth=0.3)
    figure.savefig(path, dpi=130)
