"""Compare every cell of a run with the baseline and with its controls, corrected by Holm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from vps.evaluation import paired
from vps.evaluation.grid import BASELINE, Cell
from vps.evaluation.paired import Outcome
from vps.evaluation.runs import Run, RunError

ALL_TASKS = "all tasks"
LOWER_IS_BETTER = frozenset(
    {"nll", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score"}
)
NO_DIFFERENCE = "no difference"
COUNTED = "Differences are counted, not tested: few documents show large ones by chance."


@dataclass(frozen=True)
class Comparison:
    """Compare one cell with another on the same documents.

    Args:
        cell, against: their names.
        task, metric: what was measured; ``"all tasks"`` pools the documents of all.
        n: paired documents.
        base, value: means of ``against`` and of ``cell``, with standard errors.
        difference: ``value − base``, and its 95 % bootstrap interval ``low`` to ``high``, which
            is not corrected for other intervals.
        deviation: standard deviation of the paired differences.
        gained, lost: documents right under ``cell`` only and under ``against`` only; ``None``
            where answers are not right or wrong.
        p: of exact McNemar, or of the paired t-test where answers are not right or wrong.
        corrected: ``p`` after Holm's correction over its family.
    """

    cell: str
    against: str
    task: str
    metric: str
    n: int
    base: float
    base_error: float
    value: float
    value_error: float
    difference: float
    low: float
    high: float
    deviation: float
    gained: int | None
    lost: int | None
    p: float
    corrected: float = math.nan

    @property
    def verdict(self) -> str:
        """Say ``"better"``, ``"worse"`` or ``"no difference"``, by the corrected p alone."""
        if not self.corrected < paired.LEVEL:
            return NO_DIFFERENCE
        up = self.difference > 0
        return "better" if up != (self.metric in LOWER_IS_BETTER) else "worse"


@dataclass(frozen=True)
class Detectable:
    """Name the smallest true difference that a task would show, at Holm's strictest step.

    ``spread`` is the share of documents that change (right or wrong), or the deviation of the
    differences, as the mean over the cells.
    """

    task: str
    metric: str
    n: int
    spread: float
    effect: float
    binary: bool


@dataclass(frozen=True)
class Analysis:
    """Hold everything that a report shows.

    Args:
        run: what the folder holds.
        to_baseline: cells and controls against the baseline. Holm's correction takes the cells for
            one family, over all tasks and metrics, and the controls for another.
        to_controls: cells against their controls: the third family.
        detectable: for every task and metric.
        waiting: finished cells that are held back, with the controls they wait for.
        failed: cells with their errors.
        unfinished: names of the cells not evaluated yet.
        cost: seconds of each cell over those of the baseline.
        resamples: of each bootstrap interval.
    """

    run: Run
    to_baseline: tuple[Comparison, ...]
    to_controls: tuple[Comparison, ...]
    detectable: tuple[Detectable, ...]
    waiting: Mapping[str, list[str]]
    failed: Mapping[str, str]
    unfinished: tuple[str, ...]
    cost: Mapping[str, float]
    resamples: int

    @property
    def cells(self) -> dict[str, Cell]:
        """Return all cells of the grid by name."""
        return {cell.name: cell for cell in self.run.cells}

    def is_control(self, name: str) -> bool:
        """Tell whether a cell is a control, not one that the grid asks for."""
        return self.cells[name].control is not None


def analyse(run: Run, *, without_controls: bool = False, resamples: int = 9999) -> Analysis:
    """Compare all finished cells of a run.

    Args:
        run: of :func:`vps.evaluation.runs.read_run`.
        without_controls: show cells whose controls are not finished too.
        resamples: of the bootstrap.

    Raises:
        RunError: the baseline is not finished, or a cell saw other documents than the baseline.
        ModuleNotFoundError: scipy is missing.
    """
    finished = run.finished
    if 0 not in finished:
        reason = run.records[0].error if 0 in run.records else "not evaluated yet"
        raise RunError(f"the baseline is not finished ({reason}): nothing can be compared")
    held = {} if without_controls else run.waiting
    shown = [
        cell
        for cell in run.cells
        if cell.index in finished and cell.name not in held and cell.name != BASELINE
    ]
    columns = {cell.name: _columns(finished[cell.index].outcomes) for cell in shown}
    columns[BASELINE] = _columns(finished[0].outcomes)
    to_baseline: dict[bool, list[Comparison]] = {False: [], True: []}  # by being a control
    to_controls = []
    for cell in shown:
        if cell.control is not None and all(name in held for name in cell.of):
            continue
        control = cell.control is not None
        to_baseline[control] += _compare(cell.name, BASELINE, columns, resamples)
        for name in cell.of:
            if name in columns:
                to_controls += _compare(name, cell.name, columns, resamples)
    place = {cell.name: cell.index for cell in run.cells}
    to_controls.sort(key=lambda each: (place[each.cell], place[each.against]))
    asked = _corrected(to_baseline[False])
    corrected = sorted((*asked, *_corrected(to_baseline[True])), key=lambda each: place[each.cell])
    seconds = finished[0].seconds
    return Analysis(
        run,
        tuple(corrected),
        _corrected(to_controls),
        _detectable(asked),
        held,
        {run.cells[i].name: record.error for i, record in run.records.items() if record.error},
        tuple(cell.name for cell in run.cells if cell.index not in run.records),
        {cell.name: finished[cell.index].seconds / seconds for cell in shown if seconds > 0},
        resamples,
    )


def compare(
    outcomes: Mapping[str, Sequence[Outcome]],
    pairs: Sequence[tuple[str, str]],
    *,
    resamples: int = 9999,
) -> tuple[Comparison, ...]:
    """Compare ways to run a model on the same documents; Holm's correction takes all for a family.

    Args:
        outcomes: of each, by its name.
        pairs: names to compare, each against the other.
        resamples: of the bootstrap.

    Raises:
        RunError: unequal documents.
        ModuleNotFoundError: scipy is missing.
    """
    columns = {name: _columns(each) for name, each in outcomes.items()}
    found = [each for one, other in pairs for each in _compare(one, other, columns, resamples)]
    return _corrected(found)


def table_rows(outcomes: Mapping[str, Sequence[Outcome]]) -> list[dict[str, Any]]:
    """Make one row for every task, metric and variant, without statistics.

    Args:
        outcomes: of each variant, by its name.

    Returns:
        Dicts of ``task``, ``metric``, ``variant``, ``n`` (documents) and ``value`` (weighted mean);
        with a baseline among the variants also ``difference`` from it and, where all values are 0
        or 1, ``gained`` and ``lost`` documents, else ``None``.

    Raises:
        ValueError: variants of unequal documents, or a document twice.
    """
    for each in outcomes.values():
        paired.check_outcomes(each)
    columns = {name: _columns(each, pooled=False) for name, each in outcomes.items()}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name in columns:
        against = BASELINE if BASELINE in columns else name
        for (task, metric), own, base in _paired(name, against, columns):
            row = {"task": task, "metric": metric, "variant": name, "n": len(own.values)}
            row["value"] = own.mean[0]
            if BASELINE in columns:
                row["difference"] = own.mean[0] - base.mean[0]
                row["gained"], row["lost"] = own.flips(base)
            found.setdefault((task, metric), []).append(row)
    return [row for rows in found.values() for row in rows]


def table_text(rows: Sequence[Mapping[str, Any]], scopes: Sequence[Mapping[str, str]]) -> str:
    """Write the rows as a table, with the scopes that ran, by kind of request."""
    lines: list[str] = []
    for (task, metric, n), group in groupby(rows, itemgetter("task", "metric", "n")):
        lines += [*([""] if lines else []), f"{task}, {metric}, {n} documents"]
        for row in group:
            line = f"  {row['variant']:<20} {row['value']:9.4f}"
            if "difference" in row and row["variant"] != BASELINE:
                line += f"  {row['difference']:+9.4f}"
                if row["gained"] is not None:
                    line += f"  +{row['gained']} −{row['lost']}"
            lines.append(line)
    ran = {f"{kind} under scope {s}" for each in scopes for kind, s in each.items()}
    return "\n".join([*lines, "", *([f"ran: {', '.join(sorted(ran))}"] if ran else []), COUNTED])


@dataclass(frozen=True)
class _Column:
    """Hold the values of one task and metric by document."""

    documents: tuple[str, ...]
    values: Any
    weights: Any
    groups: tuple[str, ...]

    @cached_property
    def mean(self) -> tuple[float, float]:
        """Return the weighted mean and its standard error."""
        return paired.weighted_mean(self.values, self.weights)

    def flips(self, base: _Column) -> tuple[int, int] | tuple[None, None]:
        """Count the documents gained and lost, where all are right or wrong."""
        for each in (self, base):
            if not np.isin(each.values, (0.0, 1.0)).all() or (each.weights != 1).any():
                return None, None
        d = self.values - base.values
        return int((d > 0).sum()), int((d < 0).sum())


def _columns(outcomes: Sequence[Outcome], pooled: bool = True) -> dict[tuple[str, str], _Column]:
    """Group outcomes by task and metric, and over all tasks for a metric that several have."""
    groups = paired.grouped(outcomes)
    for metric in dict.fromkeys(each.metric for each in outcomes if pooled):
        every = [each for each in outcomes if each.metric == metric]
        if len({each.task for each in every}) > 1:
            groups[ALL_TASKS, metric] = every
    found = {}
    for key, group in groups.items():
        group = sorted(group, key=lambda each: (each.task, each.document))
        found[key] = _Column(
            tuple(f"{each.task}\0{each.document}" for each in group),
            np.array([each.value for each in group]),
            np.array([each.weight for each in group]),
            tuple(each.task for each in group),
        )
    return found


def _paired(
    name: str, against: str, columns: Mapping[str, Mapping[tuple[str, str], _Column]]
) -> Iterator[tuple[tuple[str, str], _Column, _Column]]:
    """Yield each task and metric with the columns of two cells, of the same documents."""
    ours, theirs = columns[name], columns[against]
    if ours.keys() != theirs.keys():
        extra = ", ".join(f"{t} ({m})" for t, m in sorted(ours.keys() ^ theirs.keys()))
        raise RunError(f"cells {name!r} and {against!r} were measured on other tasks: {extra}")
    for key, own in ours.items():
        base = theirs[key]
        if own.documents != base.documents or (own.weights != base.weights).any():
            both = len(set(own.documents) & set(base.documents))
            raise RunError(
                f"cells {name!r} and {against!r} saw other documents of {key[0]}: "
                f"{len(own.documents)} and {len(base.documents)}, {both} in common, or of other "
                "weights; they cannot be paired"
            )
        yield key, own, base


def _compare(
    name: str,
    against: str,
    columns: Mapping[str, Mapping[tuple[str, str], _Column]],
    resamples: int,
) -> list[Comparison]:
    found = []
    for (task, metric), own, base in _paired(name, against, columns):
        d = own.values - base.values
        low, high = paired.difference_interval(d, own.weights, own.groups, resamples=resamples)
        (value, value_error), (mean, mean_error) = own.mean, base.mean
        terms = d * own.weights / own.weights.mean()
        gained, lost = own.flips(base)
        if gained is not None and lost is not None:
            p = paired.mcnemar(gained, lost)
        else:
            p = paired.paired_t(d, own.weights)
        found.append(
            Comparison(
                name, against, task, metric, len(d), mean, mean_error, value, value_error,
                value - mean, low, high, float(terms.std(ddof=1)) if len(d) > 1 else math.nan,
                gained, lost, p,
            )
        )  # fmt: skip
    return found


def _corrected(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    corrected = paired.holm([each.p for each in comparisons])
    return tuple(
        dataclasses.replace(each, corrected=p)
        for each, p in zip(comparisons, corrected, strict=True)
    )


def _detectable(family: Sequence[Comparison]) -> tuple[Detectable, ...]:
    found = []
    for (task, metric), group in paired.grouped(family).items():
        n, alpha = group[0].n, paired.LEVEL / len(family)
        shares = [
            (c.gained + c.lost) / n for c in group if c.gained is not None and c.lost is not None
        ]
        binary = len(shares) == len(group)
        if binary:
            spread = sum(shares) / len(shares)
            effect = paired.minimum_detectable_effect(n, spread, alpha)
        else:
            spread = sum(each.deviation for each in group) / len(group)
            effect = paired.minimum_detectable_mean(n, spread, alpha)
        found.append(Detectable(task, metric, n, spread, effect, binary))
    return tuple(found)
