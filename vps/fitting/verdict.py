"""Compare what was fitted on held-out examples, and say what a calibration is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vps.evaluation.comparison import Comparison, compare
from vps.evaluation.paired import Outcome
from vps.evaluation.templates import render
from vps.fitting.candidates import Candidate
from vps.fitting.descent import each_nll
from vps.fitting.examples import Encoded, LeftOut, listed
from vps.model.calibration import Calibration

HELD_OUT = "held-out examples"
SIDE = "other text"
PLAIN = "plain"
SHARPENING = "sharpening"
TEMPLATE = Path(__file__).with_name("calibration.txt")
TITLES = {
    "plain": "plain model",
    "sharpening": "sharpening, calibrated",
    "scale": "plain output scale",
    "random-1": "random features, draw 1",
    "random-2": "random features, draw 2",
    "static": "static features",
    "lora": "LoRA",
}


def outcomes(
    model: Any,
    candidate: Candidate,
    parts: Mapping[str, Sequence[Encoded]],
    advance: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Measure the nll per scored token of every example under ``candidate``, weighted by tokens."""
    found = []
    for task, examples in parts.items():
        values = each_nll(model, candidate, examples, advance)
        for each, value in zip(examples, values, strict=True):
            own = value / each.scored
            found.append(Outcome(task, each.identity, "nll", own, weight=float(each.scored)))
    return found


def comparisons(found: dict[str, list[Outcome]]) -> dict[str, list[Comparison]]:
    """Compare sharpening with the plain model, the controls with it, sharpening with them.

    Each is a family of Holm's correction. Tasks are compared apart: there is no pooled row.
    """
    controls = [name for name in found if name not in (PLAIN, SHARPENING)]
    families = {
        "sharpening": [(SHARPENING, PLAIN)],
        "controls": [(name, PLAIN) for name in controls],
        "against controls": [(SHARPENING, name) for name in controls],
    }
    tasks = list(dict.fromkeys(each.task for each in found[PLAIN]))
    result = {}
    for title, pairs in families.items():
        if not pairs:
            continue
        # Side effects and gains are different questions: a family of each.
        result[title] = [
            each
            for task in tasks
            for each in compare(
                {name: [o for o in own if o.task == task] for name, own in found.items()}, pairs
            )
        ]
    return result


def improves(families: dict[str, list[Comparison]]) -> bool | None:
    """Tell whether sharpening is better than the plain model on held-out examples; ``None`` where
    there are too few."""
    for each in families.get("sharpening", []):
        if each.task == HELD_OUT:
            return each.verdict == "better" if each.n > 1 else None
    return None


def as_dict(families: dict[str, list[Comparison]]) -> dict[str, list[dict[str, Any]]]:
    """Return plain values for JSON, ``None`` for what is not a number."""
    return {
        title: [
            {
                key: None if isinstance(value, float) and value != value else value
                for key, value in {**dataclasses.asdict(each), "verdict": each.verdict}.items()
            }
            for each in family
        ]
        for title, family in families.items()
    }


def text(calibration: Calibration) -> str:
    """Return a report in a few lines.

    It says what was fitted, its held-out loss against the plain model and the controls, its side
    effects, and what follows.

    Args:
        calibration: with the report that :func:`vps.calibrate` made.
    """
    gammas = calibration.gamma.values()
    return render(
        TEMPLATE,
        calibration=calibration,
        report=calibration.report,
        titles=TITLES,
        largest=max(max(map(abs, g)) if isinstance(g, tuple) else abs(g) for g in gammas),
        left_out=listed([LeftOut(**each) for each in calibration.report.get("left_out", [])]),
    ).strip("\n")
