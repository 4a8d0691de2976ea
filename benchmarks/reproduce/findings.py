"""Compare the cells of a finished part by the tests that the preregistration names.

Exact McNemar (a paired t-test for prose), two one-sided tests of equivalence, both corrected by
Holm within a family; and beside each the smallest effect that it would have seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.reproduce import equivalence
from benchmarks.reproduce.cells import COUPLED, UNCOUPLED
from benchmarks.reproduce.measures import ACCURACY, BEST, EXACT, LOSS
from vps.evaluation import paired
from vps.evaluation.comparison import Comparison, compare
from vps.evaluation.grid import BASELINE
from vps.evaluation.paired import Outcome
from vps.evaluation.runs import Run, RunError

# Two points; nats a token, 0.05 bits.
MARGINS = {ACCURACY: 0.02, BEST: 0.02, EXACT: 0.02, LOSS: 0.035}
POOLED = {ACCURACY: "questions", BEST: "questions", EXACT: "problems", LOSS: "prose"}
PLAIN, CONTROLS, NULLS, COUPLING, CURVATURE = (
    "against the plain model",
    "against its controls",
    "controls against the plain model",
    "coupling",
    "L-BFGS",
)
LEFT_OUT = {UNCOUPLED: COUPLING, "no L-BFGS": CURVATURE}  # by the name of the cells without it


@dataclass(frozen=True)
class Finding:
    """Hold one comparison with its tests.

    Args:
        family: of Holm's corrections.
        comparison: of the pooled tasks; its ``corrected`` p is within the family.
        equivalent: p of the two one-sided tests at ±margin, corrected within the family.
        margin: in the metric's unit.
        detectable: smallest true difference that the test of difference would have found with a
            chance of 80 %, at Holm's strictest step.
    """

    family: str
    comparison: Comparison
    equivalent: float
    margin: float
    detectable: float

    @property
    def verdict(self) -> str:
        """Say what the two tests show, ``"undecided"`` where neither shows anything."""
        within = self.equivalent < paired.LEVEL
        found = self.comparison.verdict
        if found in ("better", "worse"):
            return f"{found}, but by less than the margin" if within else found
        return "equivalent" if within else "undecided"


def families(run: Run) -> dict[str, list[tuple[str, str]]]:
    """Return the pairs of cells that each family compares, the first against the second."""
    asked = [cell for cell in run.cells if cell.control is None and cell.name != BASELINE]
    controls = [cell for cell in run.cells if cell.control is not None]
    names = {cell.name for cell in run.cells}
    found = {
        PLAIN: [(cell.name, BASELINE) for cell in asked if not cell.name.startswith(UNCOUPLED)],
        CONTROLS: [(name, cell.name) for cell in controls for name in cell.of],
        NULLS: [(cell.name, BASELINE) for cell in controls],
    }
    for without, family in LEFT_OUT.items():
        pairs = [(c.name.replace(without, COUPLED), c.name) for c in asked if without in c.name]
        found[family] = [pair for pair in pairs if pair[0] in names]
    return {name: pairs for name, pairs in found.items() if pairs}


def findings(run: Run, *, resamples: int = 9999) -> dict[str, list[Finding]]:
    """Compare the cells of a run, by metric.

    Args:
        run: of a finished part.
        resamples: of each bootstrap interval.

    Raises:
        RunError: a cell is not finished.
    """
    missing = [cell.name for cell in run.cells if cell.index not in run.finished]
    if missing:
        raise RunError(f"not finished: {', '.join(missing[:3])} ({len(missing)} cells)")
    every = {cell.name: run.finished[cell.index].outcomes for cell in run.cells}
    metrics = dict.fromkeys(each.metric for each in every[BASELINE] if each.metric in MARGINS)
    return {
        metric: [
            finding
            for family, pairs in families(run).items()
            for finding in _family(family, pairs, metric, every, resamples)
        ]
        for metric in metrics
    }


def pooled(outcomes: Sequence[Outcome], metric: str) -> list[Outcome]:
    """Put the outcomes of a metric into one task, whatever kind they are of."""
    return [
        Outcome(
            POOLED[metric], f"{each.task} {each.document}", metric, each.value, each.margin,
            each.weight,
        )
        for each in outcomes
        if each.metric == metric
    ]  # fmt: skip


def _family(
    family: str,
    pairs: Sequence[tuple[str, str]],
    metric: str,
    every: Mapping[str, Sequence[Outcome]],
    resamples: int,
) -> list[Finding]:
    names = dict.fromkeys(name for pair in pairs for name in pair)
    one = {name: pooled(every[name], metric) for name in names}
    compared = compare(one, pairs, resamples=resamples)
    margin = MARGINS[metric]
    equivalent = paired.holm([_equivalent(each, one, margin) for each in compared])
    return [
        Finding(family, each, p, margin, _detectable(each, len(compared)))
        for each, p in zip(compared, equivalent, strict=True)
    ]


def _equivalent(
    compared: Comparison, every: Mapping[str, Sequence[Outcome]], margin: float
) -> float:
    if compared.gained is not None and compared.lost is not None:
        return equivalence.accuracies(compared.gained, compared.lost, compared.n, margin)
    ours, theirs = (
        np.array([each.value for each in sorted(every[name], key=lambda each: each.document)])
        for name in (compared.cell, compared.against)
    )
    return equivalence.means(ours - theirs, margin)


def _detectable(compared: Comparison, tests: int) -> float:
    alpha = paired.LEVEL / tests
    if compared.gained is not None and compared.lost is not None:
        discordance = (compared.gained + compared.lost) / compared.n
        return paired.minimum_detectable_effect(compared.n, discordance, alpha)
    return paired.minimum_detectable_mean(compared.n, compared.deviation, alpha)
