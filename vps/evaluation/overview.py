"""The table that a run keeps up to date while it goes on, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from vps.evaluation.runs import Run
from vps.evaluation.statistics import weighted_mean

WAITS = "waits for its controls"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table; the first ``words`` columns to the left, the others to the right."""
    rule = ["---" if place < words else "---:" for place in range(len(header))]
    lines = [[plain(each) for each in line] for line in (header, *rows)]
    lines.insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def waiting(run: Run) -> dict[str, list[str]]:
    """Finished cells that have controls to come, which must not be shown alone, and which ones."""
    missing: dict[str, list[str]] = {}
    for cell in run.cells:
        if cell.control is not None and cell.index not in run.finished:
            for name in cell.of:
                missing.setdefault(name, []).append(cell.name)
    done = [cell.name for cell in run.cells if cell.index in run.finished]
    return {name: missing[name] for name in done if name in missing}


def progress_table(run: Run) -> str:
    """Every cell of the grid, and the means of those that are finished, with their controls."""
    held = waiting(run)
    columns: dict[tuple[str, str], None] = {}
    means: dict[int, dict[tuple[str, str], float]] = {}
    for index, record in run.finished.items():
        groups: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
        for each in record.outcomes:
            values, weights = groups.setdefault((each.task, each.metric), ([], []))
            values.append(each.value)
            weights.append(each.weight)
        means[index] = {key: weighted_mean(*group)[0] for key, group in groups.items()}
        columns |= dict.fromkeys(groups)
    rows = []
    for cell in run.cells:
        ran = run.records.get(cell.index)
        if ran is None:
            state = "not yet"
        elif ran.error is not None:
            state = f"failed: {ran.error}"
        else:
            state = WAITS if cell.name in held else "done"
        shown = means.get(cell.index, {}) if state == "done" else {}
        numbers = [f"{shown[key]:.4f}" if key in shown else "" for key in columns]
        seconds = "" if ran is None else f"{ran.seconds:.1f}"
        rows.append([cell.name, state, *numbers, seconds])
    header = ["cell", "state", *(f"{task}, {metric}" for task, metric in columns), "seconds"]
    done = f"{len(run.finished)} of {len(run.cells)} cells are finished."
    note = "Means without statistics: `vps report` compares."
    return f"# {plain(run.title)}\n\n{done} {note}\n\n{markdown(header, rows, 2)}"


def plain(text: str) -> str:
    """Text that stays in its place in Markdown and becomes no markup."""
    for mark in "\\|`*_<>[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
