"""The report of a run: Markdown, CSV, two pictures, and one page that needs nothing else."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

from vps import jsonl
from vps.evaluation import figures, summary
from vps.evaluation.comparison import Analysis, Comparison, analyse
from vps.evaluation.overview import markdown, plain
from vps.evaluation.page import html_page
from vps.evaluation.runs import read_run

FILES = ("report.md", "report.csv", "forest.png", "cost.png", "report.html")


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
    figures.check()
    analysis = analyse(read_run(folder), without_controls=without_controls, resamples=resamples)
    out = folder if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    figures.forest(analysis, out / "forest.png")
    figures.cost(analysis, out / "cost.png")
    jsonl.replace(out / "report.csv", csv_text(analysis))
    jsonl.replace(out / "report.html", html_page(analysis))
    jsonl.replace(out / "report.md", markdown_text(analysis))
    return analysis


def markdown_text(analysis: Analysis) -> str:
    """The report for a repository; it shows ``forest.png`` and ``cost.png`` beside it."""
    words = summary.summarise(analysis)
    parts = [f"# {plain(analysis.run.title)}"]
    parts.append("\n".join(f"- {plain(line)}" for line in words.findings + words.missing))
    if analysis.to_baseline:
        parts.append("![Differences from the baseline](forest.png)")
    for (task, metric), group in summary.units(analysis.to_baseline).items():
        first = group[0]
        base = summary.level(first.base, first.base_error, first)
        parts.append(f"## {plain(summary.unit_name(task, metric))} against the baseline")
        parts.append(
            f"n = {first.n}; the baseline has {base}{summary.direction(metric)}. "
            "Controls are marked by ↳."
        )
        header = ["cell", "value", "difference", "95 % interval", "gained, lost",
                  "corrected p", "verdict", "time ÷ baseline"]  # fmt: skip
        parts.append(markdown(header, [_row(analysis, each) for each in group]))
    for (task, metric), group in summary.units(analysis.to_controls).items():
        parts.append(f"## {plain(summary.unit_name(task, metric))} against controls")
        header = ["cell", "control", "difference", "95 % interval", "gained, lost",
                  "corrected p", "verdict"]  # fmt: skip
        rows = [
            [
                each.cell,
                summary.control_title(analysis.cells[each.against]),
                *_numbers(each),
            ]
            for each in group
        ]
        parts.append(markdown(header, rows, 2))
    if analysis.cost:
        parts.append("## Cost against effect")
        parts.append("![Time against difference](cost.png)")
    parts.append("## How it was measured")
    parts.append("\n".join(f"- {plain(line)}" for line in words.methods))
    parts.append(markdown(["what", "was"], [[name, text] for name, text in words.conditions], 2))
    configs = [
        [cell.name, summary.settings_of(cell.config)]
        for cell in analysis.run.cells
        if cell.config is not None and cell.control is None
    ]
    parts.append("## Settings that differ from the defaults")
    parts.append(markdown(["cell", "settings"], configs, 2))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def csv_text(analysis: Analysis) -> str:
    """Every comparison as a row, with the settings of its cell."""
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


def _row(analysis: Analysis, each: Comparison) -> list[str]:
    cell = analysis.cells[each.cell]
    name = each.cell if cell.control is None else f"↳ {summary.control_title(cell)}"
    value = summary.level(each.value, each.value_error, each)
    cost = analysis.cost.get(each.cell)
    time = "–" if cost is None else f"{summary.number(cost, 2)}{_first(analysis, cell.index)}"
    return [name, value, *_numbers(each), time]


def _first(analysis: Analysis, index: int) -> str:
    return " (first)" if analysis.run.records[index].first else ""


def _numbers(each: Comparison) -> list[str]:
    return [
        summary.change(each),
        summary.interval(each),
        summary.flips(each),
        summary.probability(each.corrected),
        each.verdict,
    ]


def _safe(value: object) -> object:
    """Text that a spreadsheet does not take for a formula."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return value
