"""Put the findings of ``benchmarks.reproduce`` into the tables of docs/reproduction.md.

What is not finished is said in its place. Where a test was planned a row has its verdict, and every
row has the smallest true difference that it would have shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.reproduce import questions, report
from benchmarks.reproduce.findings import CONTROLS, COUPLING, NULLS, PLAIN
from benchmarks.reproduce.measures import ACCURACY, BEST, EXACT, LOSS
from vps.evaluation.grid import BASELINE

CONTROL = {name: title for name, (title, _) in report.CONTROL_MARKS.items()}

Values = dict[str, Any]
Table = list[str]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return the lines of a table of Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
    return [lines[0], "|---" * len(heads) + "|", *lines[1:]]


def signed(value: float, low: float, high: float, digits: int = 2) -> str:
    """Write a difference with its interval."""
    text = f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return text.replace("-", "−")


def where(facts: Values, seed: int) -> str:
    """Name machine, versions, commit and seed in a line."""
    return (
        f"{facts['cpu']}, {facts['instructions']}, {facts['threads']} "
        f"thread{'s' * (facts['threads'] > 1)}, torch {facts['torch']}, commit {facts['commit']}, "
        f"seed {seed}."
    )


class Study:
    """The findings of the study, those of its finished parts.

    Args:
        values: of ``findings.json``; ``None`` before the first report.
    """

    def __init__(self, values: Values | None) -> None:
        self.parts: Values = values["parts"] if values else {}
        self.unfinished: Values = values["unfinished"] if values else dict.fromkeys(report.PARTS)

    def missing(self, *parts: str) -> Table:
        """Say which parts are not finished."""
        lines = [
            f"*Not finished: part {name}, {report.state(*(self.unfinished[name] or (0, 0)))}.*"
            for name in parts
            if name not in self.parts
        ]
        return ["", *lines] if lines else []

    def found(self, part: str, metric: str, family: str) -> list[Values]:
        """Return the findings of a family, by part and metric."""
        own = self.parts[part]["findings"] if part in self.parts else ()
        return [e for e in own if (e["family"], e["comparison"]["metric"]) == (family, metric)]

    def places(self, *parts: str) -> Table:
        """Return where the parts were measured, each place once."""
        lines = dict.fromkeys(
            where(facts, self.parts[name]["settings"]["seed"])
            for name in parts
            if name in self.parts
            for facts in self.parts[name]["facts"]
        )
        return ["", *lines] if lines else []


def named(name: str) -> str:
    """Call a cell or control as the page does."""
    for control, title in CONTROL.items():
        name = name.replace(control, title)
    return {"baseline": "the plain model"}.get(name, name)


def compared(rows: Sequence[Values], metric: str, against: bool = False) -> Table:
    """Return comparisons as a table: difference with its interval, verdict, smallest effect."""
    _, factor, unit = report.UNITS[metric]
    digits = 3 if metric == LOSS else 2
    heads = ["", "n", "plain", "sharpened"]
    if against:
        heads = ["", "against", "n", "reference", "this row"]
    heads += [f"difference, {unit} [95 %]", "verdict", f"would have seen, {unit}"]

    def cells(each: Values) -> Iterable[str]:
        own = each["comparison"]
        low, at, high = (factor * own[name] for name in ("low", "difference", "high"))
        yield own["cell"]
        if against:
            yield named(own["against"].rpartition(" · ")[2])
        yield f"{own['n']:,}"
        yield from (f"{factor * own[name]:.{digits}f}" for name in ("base", "value"))
        yield signed(at, low, high, digits)
        yield each.get("verdict", "not tested")
        yield f"{factor * each['detectable']:.2g}"

    return table(heads, (list(cells(each)) for each in rows)) if rows else []


def counted(rows: Sequence[Values], metric: str, what: str) -> Table:
    """Count verdicts in a sentence."""
    if not rows:
        return []
    _, factor, unit = report.UNITS[metric]
    verdicts = Counter(each["verdict"] for each in rows)
    low, high = (factor * pick(each["detectable"] for each in rows) for pick in (min, max))
    said = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    return [
        "",
        f"{what}, {len(rows)} comparisons: {said}. Each would have seen {low:.2g} to {high:.2g} "
        f"{unit}.",
    ]


def gain(study: Study) -> Table:
    """Sharpened against plain, choice questions."""
    rows = [e for part in ("main", "settings") for e in study.found(part, ACCURACY, PLAIN)]
    parts = ("main", "settings")
    return compared(rows, ACCURACY) + study.missing(*parts) + study.places(*parts)


def guidance(study: Study) -> Table:
    """Sharpened against controls, choice questions."""
    others = study.found("settings", ACCURACY, CONTROLS)
    nulls = [e for part in ("main", "settings") for e in study.found(part, ACCURACY, NULLS)]
    return [
        *compared(study.found("main", ACCURACY, CONTROLS), ACCURACY, against=True),
        *counted(others, ACCURACY, "Other settings against their controls"),
        *counted(nulls, ACCURACY, "Controls of all settings against the plain model"),
        *study.missing("main", "settings"),
    ]


def generated(study: Study) -> Table:
    """Generated answers against the plain model and controls."""
    rows = [e for f in (PLAIN, CONTROLS) for e in study.found("generated", EXACT, f)]
    return compared(rows, EXACT, against=True) + study.missing("generated")


def prose(study: Study) -> Table:
    """Bits a token of prose."""
    parts = ("main", "settings")
    rows = [e for part in parts for e in study.found(part, LOSS, PLAIN)]
    controls = [e for part in parts for e in study.found(part, LOSS, CONTROLS)]
    said = counted(controls, LOSS, "All settings against their controls")
    return compared(rows, LOSS) + said + study.missing(*parts)


def coupling(study: Study) -> Table:
    """With coupling against without."""
    rows = study.found("main", ACCURACY, COUPLING)
    bits = study.found("main", LOSS, COUPLING)
    return [
        *compared(rows, ACCURACY, against=True),
        *(["", "The same on prose:", "", *compared(bits, LOSS, against=True)] if bits else []),
        *study.missing("main"),
    ]


def loop(study: Study) -> Table:
    """The last answer of the loop, and the one that the labels choose."""
    heads = ["", "plain", "last answer", "answer of lowest loss", "would have seen, points"]
    rows = [e for f in (PLAIN, NULLS) for e in study.found("loop", ACCURACY, f)]
    best = {
        e["comparison"]["cell"]: e["comparison"]
        for f in (PLAIN, NULLS)
        for e in study.found("loop", BEST, f)
    }

    def change(own: Values) -> str:
        return signed(*(100 * own[name] for name in ("difference", "low", "high")), digits=1)

    lines = [
        [
            named(each["comparison"]["cell"]), f"{100 * each['comparison']['base']:.1f}",
            change(each["comparison"]), change(best[each["comparison"]["cell"]]),
            f"{100 * each['detectable']:.2g}",
        ]
        for each in rows
    ]  # fmt: skip
    count = f"n = {rows[0]['comparison']['n']}." if rows else ""
    return (table(heads, lines) + ["", count] if rows else []) + study.missing("loop")


def selection(study: Study) -> Table:
    """What every cell gains on the third that the paper's selection keeps."""
    lines: Table = []
    for part in ("main", "loop"):
        kept = study.parts.get(part, {}).get("selected", {})
        if not kept:
            continue
        rows = []
        for arm in next(iter(kept.values())):
            gains = ([100 * own[arm][k] for k in ("mean", "low", "high")] for own in kept.values())
            rows.append([named(arm), *(signed(*each, digits=1) for each in gains)])
        heads = [f"{part}: gain in points", *(f"the {order} third" for order in kept)]
        lines += [*table(heads, rows), ""]
    return lines + study.missing("main", "loop")


def kinds(study: Study) -> Table:
    """Accuracy by kind of question, which is described and not tested."""
    means = study.parts["main"]["kinds"] if "main" in study.parts else {}
    cells = [BASELINE, *(e["comparison"]["cell"] for e in study.found("main", ACCURACY, PLAIN))]
    rows = [
        [
            named(cell),
            *(f"{100 * means[cell][f'{kind}, {ACCURACY}']:.1f}" for kind in questions.KINDS),
        ]
        for cell in cells
        if means
    ]
    return (table(["", *questions.KINDS], rows) if rows else []) + study.missing("main")


TABLES = (gain, kinds, generated, prose, guidance, selection, loop, coupling)
