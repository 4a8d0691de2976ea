"""Put an analysis into sentences, and its numbers into the text of a report."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from vps.config import VPSConfig
from vps.evaluation import paired
from vps.evaluation.comparison import (
    ALL_TASKS,
    LOWER_IS_BETTER,
    NO_DIFFERENCE,
    Analysis,
    Comparison,
    Detectable,
)
from vps.evaluation.grid import Cell

MOST_NAMES = 6


@dataclass(frozen=True)
class Summary:
    """Hold the sentences of a report by their place in it."""

    findings: list[str]
    missing: list[str]
    methods: list[str]
    conditions: list[tuple[str, str]]


def summarise(analysis: Analysis) -> Summary:
    """Return everything that a report says in words."""
    return Summary(
        _findings(analysis), _missing(analysis), _methods(analysis), _conditions(analysis)
    )


def units(comparisons: Sequence[Comparison]) -> dict[tuple[str, str], list[Comparison]]:
    """Group comparisons by task and metric, all tasks together first."""
    groups = paired.grouped(comparisons)
    return dict(sorted(groups.items(), key=lambda item: item[0][0] != ALL_TASKS))


def unit_name(task: str, metric: str) -> str:
    """Write task and metric for a title."""
    return f"{task}, {metric}"


def direction(metric: str) -> str:
    """Say of a metric that its low values are good, where they are."""
    return "; lower is better" if metric in LOWER_IS_BETTER else ""


def number(value: float, digits: int = 4, sign: bool = False) -> str:
    """Write a number with a real minus; a dash for none."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if not float(text):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def level(value: float, error: float, comparison: Comparison) -> str:
    """Write a mean with its standard error: percent right, or the metric itself."""
    if comparison.gained is not None:
        return f"{number(100 * value, 1)} % ± {number(100 * error, 1)}"
    text = f"{number(value)} ± {number(error)}"
    if comparison.metric == "nll" and value < 700:
        found, own = paired.perplexity(value, error)
        text += f" (perplexity {number(found, 2)} ± {number(own, 2)})"
    return text


def change(comparison: Comparison) -> str:
    """Write the difference in points of percent, or in the metric's unit."""
    scale, digits = scaled(comparison)
    unit = " points" if comparison.gained is not None else ""
    return f"{number(scale * comparison.difference, digits, True)}{unit}"


def interval(comparison: Comparison) -> str:
    """Write the bootstrap interval in the unit of :func:`change`."""
    scale, digits = scaled(comparison)
    ends = (number(scale * end, digits, True) for end in (comparison.low, comparison.high))
    return f"[{', '.join(ends)}]"


def scaled(comparison: Comparison) -> tuple[float, int]:
    """Return factor and digits of the differences as they are written."""
    return (100.0, 1) if comparison.gained is not None else (1.0, 4)


def flips(comparison: Comparison) -> str:
    """Write the answers gained and lost."""
    if comparison.gained is None:
        return "–"
    return f"+{comparison.gained} −{comparison.lost}"


def probability(p: float) -> str:
    """Write p."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def control_title(cell: Cell) -> str:
    """Name a control as it stands under its cell."""
    others = f", of {len(cell.of)} cells" if len(cell.of) > 1 else ""
    draw = f" {cell.draw + 1}" if cell.draw else ""
    return f"{str(cell.control).replace('_', ' ')}{draw}{others}"


def settings_of(config: VPSConfig) -> str:
    """Write the fields that differ from the defaults."""
    plain, values = (json.loads(json.dumps(asdict(each))) for each in (VPSConfig(), config))
    return ", ".join(f"{name} {values[name]}" for name in values if values[name] != plain[name])


def _findings(analysis: Analysis) -> list[str]:
    asked = [each for each in analysis.to_baseline if not analysis.is_control(each.cell)]
    controls = [each for each in analysis.to_baseline if analysis.is_control(each.cell)]
    if not asked:
        return ["No cell can be compared with the baseline yet."]
    found = [_differing("Against the baseline", "cell", asked, _named)]
    if controls:
        found.append(_differing("Controls against the baseline", "control", controls, _verdicts))
        pairs = analysis.to_controls
        better = [each for each in pairs if each.verdict == "better"]
        worse = [each for each in pairs if each.verdict == "worse"]
        if not better and not worse:
            found.append(
                "Against controls: no difference in any cell. Nothing here shows that it matters "
                "which features are sharpened."
            )
        for word, group in (("better", better), ("worse", worse)):
            if group:
                listed = _listed(_against_control(analysis, each) for each in group)
                found.append(f"Against controls: {len(group)} of {len(pairs)} {word}: {listed}.")
    elif not any(cell.control is not None for cell in analysis.run.cells):
        found.append(
            "No controls were run, as the grid asked: a difference from the baseline would not "
            "show that it matters which features are sharpened."
        )
    else:
        found.append("Controls are missing, and the cells are shown without them as was asked.")
    return found


def _against_control(analysis: Analysis, each: Comparison) -> str:
    control = control_title(analysis.cells[each.against])
    return f"{each.cell} than {control} ({_effect(each)})"


def _effect(each: Comparison) -> str:
    return f"{change(each)}, {each.task}, {each.metric}, p {probability(each.corrected)}"


def _differing(
    title: str,
    noun: str,
    comparisons: Sequence[Comparison],
    tell: Callable[[Sequence[Comparison]], str],
) -> str:
    """Count the cells that differ, and tell of those that do."""
    total = len({each.cell for each in comparisons})
    subject = f"{total} {noun}{'' if total == 1 else 's'}"
    differing = [each for each in comparisons if each.verdict != NO_DIFFERENCE]
    if not differing:
        return f"{title}: no difference in any of {subject}."
    count = len({each.cell for each in differing})
    return f"{title}: {count} of {subject} differ{'s' if count == 1 else ''}{tell(differing)}."


def _named(differing: Sequence[Comparison]) -> str:
    return f": {_listed(f'{each.cell} {each.verdict} ({_effect(each)})' for each in differing)}"


def _verdicts(differing: Sequence[Comparison]) -> str:
    words = [each.verdict for each in differing]
    counts = ", ".join(f"{words.count(word)} {word}" for word in ("better", "worse"))
    return f" (over tasks and metrics {counts})"


def _missing(analysis: Analysis) -> list[str]:
    found = []
    total, done = len(analysis.run.cells), len(analysis.run.finished)
    if done < total:
        found.append(f"{done} of {total} cells of the grid are finished.")
    if analysis.waiting:
        listed = _listed(analysis.waiting)
        found.append(f"Held back until their controls are finished: {listed}.")
    if analysis.failed:
        listed = _listed(f"{name} ({error})" for name, error in analysis.failed.items())
        found.append(f"Failed: {listed}.")
    if analysis.unfinished:
        found.append(f"Not evaluated yet: {_listed(analysis.unfinished)}.")
    return found


def _methods(analysis: Analysis) -> list[str]:
    controls = sum(analysis.is_control(each.cell) for each in analysis.to_baseline)
    family = len(analysis.to_baseline) - controls
    others = (
        f", and by itself over the {controls} of controls with the baseline and the "
        f"{len(analysis.to_controls)} of cells with their controls"
    )
    found = [
        "Every cell is compared with the unpatched model on the same documents. p is of the exact "
        "McNemar test where answers are right or wrong, and of a paired t-test elsewhere.",
        f"p is corrected by Holm's method over all {family} comparisons of cells with the baseline "
        f"(every cell, task and metric){others if controls else ''}. A corrected p of 0.05 or more "
        "is called no difference.",
        f"Intervals are 95 % paired bootstrap intervals ({analysis.resamples} samples, "
        "percentiles, documents drawn within their task) and are not corrected; one of no width "
        "means that no answer changed, not that none could. ± is one standard error.",
    ]
    return found + [_detectable(each, family) for each in analysis.detectable]


def _detectable(each: Detectable, family: int) -> str:
    unit = unit_name(each.task, each.metric)
    alpha = f"p < {paired.LEVEL:g}/{family}, Holm's strictest step"
    if each.binary:
        spread = f"when {number(100 * each.spread, 1)} % of the answers change, as they did"
        effect = f"{number(100 * each.effect, 1)} points"
    else:
        spread = f"at a standard deviation of {number(each.spread)} of the differences"
        effect = number(each.effect)
    if math.isinf(each.effect):
        return f"{unit}: n = {each.n} documents cannot show any difference ({alpha})."
    return (
        f"{unit}: n = {each.n}. The minimum detectable effect is {effect} (80 % power, {alpha}, "
        f"{spread}): a smaller true difference would mostly be called none."
    )


def _conditions(analysis: Analysis) -> list[tuple[str, str]]:
    run = analysis.run
    found = [
        (name.replace("_", " "), _written(value))
        for name, value in run.definition.items()
        if value is not None and value != []
    ]
    found.append(("scope", _scopes(analysis)))
    configs = [cell.config for cell in run.cells if cell.config is not None]
    seeds = sorted({config.seed for config in configs})
    draws = max(cell.draw for cell in run.cells) + 1
    text = f"VPSConfig.seed {', '.join(map(str, seeds))}"
    if any(cell.control is not None for cell in run.cells):
        text += f"; controls {', '.join(map(str, range(draws)))}"
    found.append(("seeds", text))
    facts: dict[str, Counter[str]] = {}
    for record in run.finished.values():
        for name, value in record.facts.items():
            facts.setdefault(name, Counter())[str(value)] += 1
    for name, counts in facts.items():
        several = len(counts) > 1
        text = "; ".join(f"{v} ({n} cells)" if several else v for v, n in counts.items())
        found.append((name, text))
    return found


def _scopes(analysis: Analysis) -> str:
    """Say which scopes ran, for what kinds of requests, in how many cells."""
    counts: dict[str, int] = {}
    looks_ahead = False
    for index, record in analysis.run.finished.items():
        config = analysis.run.cells[index].config
        if config is None:
            continue
        ran = dict(record.scopes) or {"": config.scope}
        text = ", ".join(f"{scope} ({kind})" if kind else scope for kind, scope in ran.items())
        counts[text] = counts.get(text, 0) + 1
        looks_ahead |= any(
            scope not in ("token", "prompt") and not kind.startswith("generate")
            for kind, scope in ran.items()
        )
    text = "; ".join(f"{text} in {count} cells" for text, count in counts.items())
    if looks_ahead:
        text += (
            ". Scopes other than token and prompt look ahead: where given continuations are "
            "scored, late tokens shape the update of early ones and the scores leak"
        )
    return text or "none"


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = len(every) - MOST_NAMES
    return "; ".join(every[:MOST_NAMES]) + (f"; and {more} more" if more > 0 else "")


def _written(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
