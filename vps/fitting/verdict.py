"""Compare what was fitted on held-out examples, and say what a calibration is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vps.evaluation.comparison import Comparison, compare
from vps.evaluation.paired import Outcome
from vps.fitting.candidates import Candidate
from vps.fitting.descent import each_nll
from vps.fitting.examples import Encoded, LeftOut, listed
from vps.model.calibration import Calibration

HELD_OUT = "held-out examples"
SIDE = "other text"
PLAIN = "plain"
SHARPENING = "sharpening"
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
    """Say in a few lines what was fitted, its held-out loss against plain model and controls, side
    effects, and what follows."""
    report = calibration.report
    examples = report["examples"]
    forms = report["forms"]
    largest = max(
        max(map(abs, own)) if isinstance(own, tuple) else abs(own)
        for own in calibration.gamma.values()
    )
    lines = [
        f"{forms['sharpening']['numbers']} numbers in {report['layers']} layers, one a "
        f"{calibration.per}; |γ| up to {largest:.3f}; examples: {examples['fit']} to fit, "
        f"{examples['stop']} to stop by, {examples['held_out']} held out",
        "stopping examples, nll per token: "
        f"{forms['sharpening']['plain']:.4f} plain, {forms['sharpening']['loss']:.4f} after "
        f"{forms['sharpening']['step']} steps",
    ]
    left_out = [LeftOut(**each) for each in report.get("left_out", [])]
    if left_out:
        lines.append(f"Left out, since they cannot be used: {listed(left_out)}.")
    families = report["comparisons"]
    if families:
        lines += _table(families, forms)
    unfinished = [
        TITLES[name]
        for name, candidate in forms.items()
        if candidate.get("step") == report["options"]["steps"]
    ]
    if unfinished:
        lines.append(f"Lowest at the last step, so more may lower it: {'; '.join(unfinished)}.")
    if not report["controls"]:
        lines.append(
            "No controls: whether as many numbers of another kind do the same was not measured."
        )
    lines.append(_verdict(calibration, families))
    return "\n".join(lines)


def _table(families: Mapping[str, Any], forms: Mapping[str, Any]) -> list[str]:
    rows = [*families["sharpening"], *families.get("controls", [])]
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        lines += ["", f"{task}, nll per token in nats, {own[0]['n']} examples:"]
        lines.append(f"  {TITLES['plain']:<28}{own[0]['base']:9.4f}")
        for row in own:
            title = f"{TITLES[row['cell']]} ({forms[row['cell']]['numbers']})"
            lines.append(f"  {title:<28}{row['value']:9.4f}  {_difference(row)}")
        against = [row for row in families.get("against controls", []) if row["task"] == task]
        if against:
            lines.append("  sharpening less each control:")
        lines += [f"    {TITLES[row['against']]:<35}  {_difference(row)}" for row in against]
    lines += ["", "Intervals: 95 %, paired, not corrected; verdicts after Holm's correction."]
    return lines


def _difference(row: Mapping[str, Any]) -> str:
    interval = ""
    if row["low"] is not None:
        interval = f" [{row['low']:+.4f}, {row['high']:+.4f}]"
    return f"{row['difference']:+.4f}{interval} {row['verdict']}"


def _verdict(calibration: Calibration, families: Mapping[str, Any]) -> str:
    if calibration.found is None:
        return "Not measured: there are no held-out examples, or too few."
    if not calibration.found:
        return "Nothing was found: held-out examples show no improvement."
    against = [r for r in families.get("against controls", []) if r["task"] == "held-out examples"]
    said = "Held-out examples improve."
    if against:
        better, worse = (sum(r["verdict"] == how for r in against) for how in ("better", "worse"))
        said += (
            f" Of {len(against)} controls sharpening is better than {better}, worse than {worse}"
        )
        said += "." if better == len(against) else ": that it has to be sharpening was not shown."
    side = [r for r in families["sharpening"] if r["task"] == "other text"]
    if side and side[0]["verdict"] != "no difference":
        said += f" Other text gets {side[0]['verdict']}, by {abs(side[0]['difference']):.4f}."
    return said
