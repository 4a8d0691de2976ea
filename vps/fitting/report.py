"""What a calibration says of itself, in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vps.fitting.examples import LeftOut, listed
from vps.model.calibration import Calibration

TITLES = {
    "plain": "plain model",
    "sharpening": "sharpening, calibrated",
    "scale": "plain output scale",
    "random-1": "random features, draw 1",
    "random-2": "random features, draw 2",
    "static": "static features",
    "lora": "LoRA",
}


def text(calibration: Calibration) -> str:
    """A few lines: what was fitted, its held-out loss against plain model and controls, side
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
        for name, form in forms.items()
        if form.get("step") == report["options"]["steps"]
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
