"""Report what the study of calibration found: means over seeds, every cell, and a picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from vps import Calibration, files

TITLES = {
    "sharpening": "sharpening",
    "static": "static features",
    "lora": "LoRA",
    "scale": "output scale",
    "random-1": "random features",
    "random-2": "random features, second draw",
}
TASKS = {"units": "conversion of units"}
OTHER_TEXT = "other text"
Row = dict[str, Any]


class Cell(NamedTuple):
    """Describe one calibration with its controls."""

    task: str = "arithmetic"
    size: int = 48
    per: str = "layer"
    scope: str = "token"
    builder: str = "sk"
    seed: int = 0

    @property
    def name(self) -> str:
        return "-".join(map(str, self))

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """Return the controls that the cell which differs in scope or builder alone holds."""
        return () if (self.scope, self.builder) == ("token", "sk") else ("scale", "lora")


class Found:
    """Hold the comparisons of a finished cell."""

    def __init__(self, path: Path) -> None:
        self.report = Calibration.load(path).report
        families = self.report["comparisons"]
        rows = families["sharpening"] + families.get("controls", [])
        self.held_out = by(rows, "cell", other_text=False)
        self.side_effects = by(rows, "cell", other_text=True)
        self.against = by(families.get("against controls", []), "against", other_text=False)

    @property
    def base(self) -> float:
        """Return the held-out nll of the plain model."""
        return next(iter(self.held_out.values()))["base"]


Group = list[tuple[Cell, Found]]


def by(rows: Iterable[Row], key: str, other_text: bool) -> dict[str, Row]:
    """Return rows of the held-out examples, or of the other text, in the order of TITLES."""
    found = {row[key]: row for row in rows if (row["task"] == OTHER_TEXT) == other_text}
    return {form: found[form] for form in TITLES if form in found}


def write_report(folder: Path, cells: Sequence[Cell]) -> str:
    """Write ``report.md`` and ``held-out.png`` of the finished cells; returns the text."""
    groups = finished(folder, cells)
    text = f"{overview(groups)}\n{summary(groups)}"
    files.replace(folder / "report.md", text)
    if groups:
        draw(groups, folder / "held-out.png")
    return text


def finished(folder: Path, cells: Sequence[Cell]) -> list[Group]:
    """Group finished cells that differ in the seed alone."""
    first = cells[0]

    def place(cell: Cell) -> tuple[Any, ...]:
        other = cell.task != first.task, cell[2:5] != first[2:5]
        return *other, cell[2:5], cell.task, cell.size, cell.seed

    alike = sorted(cells, key=place)
    groups = (
        [(cell, Found(path)) for cell in group if (path := folder / f"{cell.name}.json").exists()]
        for _, group in itertools.groupby(alike, key=lambda cell: cell[:-1])
    )
    return [group for group in groups if group]


def label(cell: Cell) -> str:
    """Say in what a cell differs from the one that stands for all."""
    if cell.task != "arithmetic":
        return TASKS.get(cell.task, cell.task)
    if cell.per != "layer":
        return f"a γ a {cell.per}"
    if cell.scope != "token":
        return f"scope {cell.scope}"
    return f"builder {cell.builder.upper()}" if cell.builder != "sk" else f"{cell.size} examples"


def overview(groups: Sequence[Group]) -> str:
    """Write means over seeds, in Markdown: held-out difference; side effect (verdicts)."""
    every = {cell: found for group in groups for cell, found in group}
    used = {form for found in every.values() for form in found.held_out}
    forms = [form for form in TITLES if form in used]
    lines = [
        "| | seeds | plain | " + " | ".join(TITLES[form] for form in forms) + " |",
        "|---" * (3 + len(forms)) + "|",
    ]
    for group in groups:
        cells = [group_mean(group, form, every) for form in forms]
        base = mean(found.base for _, found in group)
        lines.append(f"| {label(group[0][0])} | {len(group)} | {base:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def group_mean(group: Group, form: str, every: dict[Cell, Found]) -> str:
    """Write one entry of the overview; a control fitted elsewhere comes without verdict."""
    shown: list[Found] = []
    verdicts: list[str] = []
    for cell, found in group:
        if form in cell.elsewhere:
            there = every.get(cell._replace(scope="token", builder="sk"))
            shown += [there] if there else []
        elif form in found.held_out:
            shown.append(found)
            verdicts += [found.against[form]["verdict"]] if form in found.against else []
    if not shown:
        return ""
    held, side = (
        mean(getattr(found, rows)[form]["difference"] for found in shown)
        for rows in ("held_out", "side_effects")
    )
    counts = {"+": verdicts.count("worse"), "−": verdicts.count("better")}
    marks = " ".join(f"{sign}{count}" for sign, count in counts.items() if count)
    return f"{held:+.2f}; {side:+.2f}".replace("-", "−") + (f" ({marks})" if marks else "")


def summary(groups: Sequence[Group]) -> str:
    """Tabulate the held-out and side effects of all finished cells, in Markdown."""
    lines = [
        "| cell | form | numbers | rate | steps | held-out nll | difference | other text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell, found in itertools.chain.from_iterable(groups):
        lines.append(f"| {cell.name} | plain | 0 | | | {found.base:.3f} | | |")
        for name, row in found.held_out.items():
            form = found.report["forms"][name]
            lines.append(
                f"| | {TITLES[name]} | {form['numbers']} | {form['learning_rate']:g} | "
                f"{form['step']} | {row['value']:.3f} | {interval(row)} {row['verdict']} | "
                f"{interval(found.side_effects[name])} |"
            )
        for name, row in found.against.items():
            lines.append(
                f"| | sharpening less {TITLES[name]} | | | | | {interval(row)} {row['verdict']} | |"
            )
    return "\n".join(lines) + "\n"


def interval(row: Row) -> str:
    """Write a difference with its 95 % interval."""
    low, high = (row[end] for end in ("low", "high"))
    return f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def own(cell: Cell, found: Found) -> dict[str, Row]:
    """Return held-out rows less those that are another cell's."""
    return {form: row for form, row in found.held_out.items() if form not in cell.elsewhere}


def draw(groups: Sequence[Group], path: Path) -> None:
    """Draw the held-out difference of every form from the plain model, a line a seed, as PNG."""
    from matplotlib.figure import Figure

    across = min(2, len(groups))
    down = -(-len(groups) // across)
    figure = Figure(figsize=(1.5 + 4.5 * across, 2.1 * down + 0.6), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    for axes, group in zip(panels, groups, strict=False):
        used = {form for cell, found in group for form in own(cell, found)}
        forms = [form for form in TITLES if form in used]
        for i, (cell, found) in enumerate(group):
            for form, row in own(cell, found).items():
                color = "#0b57d0" if form == "sharpening" else "#57606a"
                place = forms.index(form) + 0.2 * (i - (len(group) - 1) / 2)
                axes.plot([row["low"], row["high"]], [place, place], color=color, linewidth=1.2)
                axes.plot(row["difference"], place, "o", color=color, markersize=4)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(forms)), [TITLES[form] for form in forms])
        axes.invert_yaxis()
        axes.locator_params(axis="x", nbins=6)
        axes.set_title(label(group[0][0]), fontsize=10, loc="left")
        axes.grid(True, axis="x", linewidth=0.3)
    figure.supxlabel("held-out nll per token less that of the plain model, nats", fontsize=10)
    figure.savefig(path, dpi=130)
