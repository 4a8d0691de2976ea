"""Held-out loss of the forms that were fitted, and what it allows to say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vps.evaluation.comparison import Comparison, compare
from vps.evaluation.paired import Outcome
from vps.fitting.descent import each_nll
from vps.fitting.examples import Encoded
from vps.fitting.forms import Form

HELD_OUT = "held-out examples"
SIDE = "other text"
PLAIN = "plain"
SHARPENING = "sharpening"


def outcomes(
    model: Any,
    form: Form,
    parts: Mapping[str, Sequence[Encoded]],
    advance: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """nll per scored token of every example under ``form``, weighted by tokens."""
    found = []
    for task, examples in parts.items():
        values = each_nll(model, form, examples, advance)
        for each, value in zip(examples, values, strict=True):
            own = value / each.scored
            found.append(Outcome(task, each.identity, "nll", own, weight=float(each.scored)))
    return found


def comparisons(found: dict[str, list[Outcome]]) -> dict[str, list[Comparison]]:
    """Sharpening against the plain model, the controls against it, sharpening against them.

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
    """Whether sharpening is better than the plain model on held-out examples; ``None`` where there
    are too few to tell."""
    for each in families.get("sharpening", []):
        if each.task == HELD_OUT:
            return each.verdict == "better" if each.n > 1 else None
    return None


def as_dict(families: dict[str, list[Comparison]]) -> dict[str, list[dict[str, Any]]]:
    """Plain values, for JSON: what is not a number is ``None``."""
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
