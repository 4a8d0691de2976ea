"""Write what the study found: every comparison, the paper's selection resampled, and a picture."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reproduce import cells, protocol
from benchmarks.reproduce.findings import (
    CONTROLS,
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
from vps.evaluation.runs import Run, read_run

FORMAT = "vps-reproduction-1"
UNITS = {  # by metric: how it is called, the factor of what is shown, and the unit of differences
    ACCURACY: ("choice questions", 100, "points"),
    BEST: ("choice questions, best of all iterations", 100, "points"),
    EXACT: ("generated answers", 100, "points"),
    LOSS: ("prose, bits a token", 1 / math.log(2), "bits"),
}
PARTS = tuple(cells.parts())
LOOP = "loop"  # which is described, not tested
TESTED = ("corrected", "p")
OWN, OTHER, BAND = "#0b57d0", "#6e7781", "#e3e8ed"  # colours of the picture
NOISE = "Gaussian noise on the margins"
CONTROL_MARKS = {  # of the picture
    "random_indices": ("random features", "o"),
    "random_noise": ("random noise", "^"),
    "shuffled_selection": ("features of another layer", "s"),
}


def write_report(folder: Path) -> str:
    """Write ``findings.json``, ``report.md`` and pictures of the finished parts in a folder.

    ``forest.png`` has every metric, ``answers.png`` those of right and wrong answers.

    Returns:
        The text of ``report.md``.
    """
    every = {name: read_run(folder / name) for name in PARTS if (folder / name).is_dir()}
    runs = {name: run for name, run in every.items() if len(run.finished) == len(run.cells)}
    found = {name: findings(run) for name, run in runs.items()}
    selection = {
        name: {order: selected(run, order) for order in ORDERS}
        for name, run in runs.items()
        if name in ("main", LOOP)
    }
    unfinished = {
        name: [len(every[name].finished), len(every[name].cells)] if name in every else [0, 0]
        for name in PARTS
        if name not in runs
    }
    values = {
        "format": FORMAT,
        "parts": {
            name: {
                "settings": run.definition,
                "facts": machines(run),
                "seconds": sum(record.seconds for record in run.finished.values()),
                "kinds": kinds(run),
                "findings": [
                    as_dict(each, name != LOOP) for own in found[name].values() for each in own
                ],
                "selected": {
                    order: {arm: dataclasses.asdict(gain) for arm, gain in gains.items()}
                    for order, gains in selection.get(name, {}).items()
                },
            }
            for name, run in runs.items()
        },
        "unfinished": unfinished,
    }
    files.replace(folder / "findings.json", json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    lines = [
        line
        for name, run in runs.items()
        for line in section(run, found[name], selection.get(name, {}), name != LOOP)
    ]
    lines += [f"Not finished: {name}, {state(*unfinished[name])}.\n" for name in unfinished]
    text = "\n".join(lines)
    files.replace(folder / "report.md", text)
    if found.keys() - {LOOP}:
        draw(found, folder / "forest.png")
        draw(found, folder / "answers.png", (ACCURACY, EXACT))
    return text


def machines(run: Run) -> list[dict[str, Any]]:
    """Return the facts of each machine and commit that finished cells of a part."""
    found: list[dict[str, Any]] = []
    for record in run.finished.values():
        if record.facts not in found:
            found.append(dict(record.facts))
    return found


def state(finished: int, count: int) -> str:
    """Say how far a part is that is not finished."""
    return f"{finished} of {count} cells" if count else "no results here yet"


def as_dict(found: Finding, tested: bool) -> dict[str, Any]:
    """Return plain values for JSON; p values and the verdict only where a test was planned."""
    values = dataclasses.asdict(found)
    if tested:
        return values | {"verdict": found.verdict}
    del values["equivalent"]
    for name in TESTED:
        del values["comparison"][name]
    return values


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
    run: Run,
    found: Mapping[str, Sequence[Finding]],
    kept: Mapping[str, Mapping[str, Gain]],
    tested: bool,
) -> Iterable[str]:
    """Yield the lines of one part, in Markdown; without p and verdict where nothing was tested."""
    yield f"## {run.title}\n"
    for facts in machines(run):
        yield (
            f"{facts['cpu']}, {facts['instructions']}, {facts['threads']} threads; torch "
            f"{facts['torch']}; commit {facts['commit']}; seed {run.definition['seed']}.\n"
        )
    for metric, every in found.items():
        title, factor, unit = UNITS[metric]
        heads = [
            "", "against", "n", "reference", "this row", f"difference, {unit} [95 %]",
            "gained, lost",
        ]  # fmt: skip
        heads += ["p", f"p of ±{MARGINS[metric] * factor:.2g}", "verdict"] if tested else []
        yield f"### {title}\n"
        yield f"| {' | '.join([*heads, 'detectable'])} |\n{'|---' * (len(heads) + 1)}|"
        for each in every:
            own = each.comparison
            flips = "" if own.gained is None else f"+{own.gained} −{own.lost}"
            low, high = (factor * end for end in (own.low, own.high))
            row = [
                own.cell, own.against, f"{own.n}", f"{factor * own.base:.2f}",
                f"{factor * own.value:.2f}",
                f"{factor * own.difference:+.2f} [{low:+.2f}, {high:+.2f}]", flips,
            ]  # fmt: skip
            if tested:
                row += [f"{own.corrected:.3g}", f"{each.equivalent:.3g}", each.verdict]
            yield f"| {' | '.join([*row, f'{factor * each.detectable:.2g}'])} |"
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


def draw(
    found: Mapping[str, Mapping[str, Sequence[Finding]]],
    path: Path,
    drawn: Sequence[str] = tuple(UNITS),
) -> None:
    """Draw the difference of every cell and its controls from the plain model, with 95 %, as PNG.

    A row is a cell, a panel a metric of ``drawn``; what is not tested is left out. The shaded band
    is the margin of equivalence. The picture is read at a width of 700 pixels, and on a phone.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    panels: dict[str, list[list[Finding]]] = {}
    for name, metrics in found.items():
        for metric in (each for each in drawn if each in metrics and name != LOOP):
            every = metrics[metric]
            nulls = {each.comparison.cell: each for each in every if each.family == NULLS}
            pairs = [each.comparison for each in every if each.family == CONTROLS]
            for each in (each for each in every if each.family == PLAIN):
                own = [pair.against for pair in pairs if pair.cell == each.comparison.cell]
                panels.setdefault(metric, []).append([each, *map(nulls.__getitem__, own)])
    sizes = [len(rows) for rows in panels.values()]
    height = 1.1 + 0.75 * len(panels) + 0.38 * sum(sizes)
    figure = Figure(figsize=(6.4, height), layout="constrained")
    every_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, (metric, rows) in zip(every_axes, panels.items(), strict=True):
        _panel(axes, metric, rows)
    marks = [("sharpened", "D", OWN), *((*each, OTHER) for each in CONTROL_MARKS.values())]
    handles: list[Any] = [
        Line2D([], [], marker=mark, color=color, label=label, linewidth=1,
               markerfacecolor=OWN if color == OWN else "white")
        for label, mark, color in marks
    ]  # fmt: skip
    handles.append(Patch(color=BAND, label="margin of equivalence"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=10, frameon=False)
    figure.savefig(path, dpi=220)


def _panel(axes: Any, metric: str, rows: Sequence[Sequence[Finding]]) -> None:
    """Draw one metric; a row holds a cell, then its controls."""
    title, factor, unit = UNITS[metric]
    axes.axvspan(*(factor * MARGINS[metric] * sign for sign in (-1, 1)), color=BAND)
    axes.axvline(0, color="black", linewidth=0.8)
    for place, row in enumerate(rows):
        for number, each in enumerate(row):
            own = each.comparison
            color, face, mark, size = OWN, OWN, "D", 6
            if number:
                mark = CONTROL_MARKS[own.cell.rpartition(" · ")[2]][1]
                color, face, size = OTHER, "white", 4
            y = place - 0.3 + 0.2 * number
            ends = [factor * own.low, factor * own.high]
            axes.plot(ends, [y, y], color=color, linewidth=1 if number else 2)
            at = factor * own.difference
            axes.plot(at, y, mark, color=color, markersize=size, markerfacecolor=face)
    axes.set_yticks(range(len(rows)), [row[0].comparison.cell for row in rows], fontsize=11)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    counts = sorted({row[0].comparison.n for row in rows}, reverse=True)
    number = " or ".join(f"{count:,}" for count in counts)
    axes.set_title(
        f"{title.partition(',')[0].capitalize()} (n = {number})", fontsize=12, loc="left"
    )
    worse = "right: worse" if metric == LOSS else "left: worse"
    axes.set_xlabel(f"difference from the plain model, {unit} ({worse})", fontsize=10)
    axes.tick_params(axis="x", labelsize=10)
    axes.grid(True, axis="x", linewidth=0.3)
