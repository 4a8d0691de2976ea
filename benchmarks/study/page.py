"""Fill the tables of docs/reproduction.md from result files: ``python -m benchmarks.study.page``.

A table stands between ``<!-- results: NAME -->`` and ``<!-- /results -->``. What is not measured
yet is said in its place. The picture of the study is drawn into docs/images.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.reproduce import report
from benchmarks.reproduce.findings import CONTROLS, COUPLING, CURVATURE, NULLS, PLAIN
from benchmarks.reproduce.measures import ACCURACY, BEST, EXACT, LOSS
from vps import files

PAGE, RESULTS = Path("docs/reproduction.md"), Path("benchmarks/results")
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- /results -->)", re.S)
TIMES = "spinning/amd-epyc-avx512-2-threads-spinning.json"
VARIANTS = ("published form, eager", "vps torch", "vps cpp")
CONTROL = {name: title for name, (title, _) in report.CONTROL_MARKS.items()}

Values = dict[str, Any]
Table = list[str]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return the lines of a table of Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
    return [lines[0], "|---" * len(heads) + "|", *lines[1:]]


def where(facts: Values, seed: int) -> str:
    """Name machine, versions, commit and seed in a line."""
    return (
        f"{facts['cpu']}, {facts['instructions']}, {facts['threads']} threads, torch "
        f"{facts['torch']}, commit {facts['commit']}, seed {seed}."
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
        return [
            f"*Not finished: part {name}, {report.state(*(self.unfinished[name] or (0, 0)))}.*"
            for name in parts
            if name not in self.parts
        ]

    def found(self, part: str, metric: str, family: str) -> list[Values]:
        """Return the findings of a family, by part and metric."""
        own = self.parts[part]["findings"] if part in self.parts else ()
        return [e for e in own if (e["family"], e["comparison"]["metric"]) == (family, metric)]

    def places(self, *parts: str) -> Table:
        """Return where the parts were measured, each place once."""
        lines = dict.fromkeys(
            where(self.parts[name]["facts"], self.parts[name]["settings"]["seed"])
            for name in parts
            if name in self.parts
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
    heads = ["", *(["against"] if against else []), "n", "there", "here"]
    heads += [f"difference, {unit} [95 %]", "verdict", f"would have seen, {unit}"]

    def cells(each: Values) -> Iterable[str]:
        own = each["comparison"]
        low, at, high = (factor * own[name] for name in ("low", "difference", "high"))
        yield own["cell"]
        if against:
            yield named(own["against"].rpartition(" · ")[2])
        yield f"{own['n']:,}"
        yield from (f"{factor * own[name]:.2f}" for name in ("base", "value"))
        yield f"{at:+.2f} [{low:+.2f}, {high:+.2f}]"
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
        low, at, high = (100 * own[name] for name in ("low", "difference", "high"))
        return f"{at:+.1f} [{low:+.1f}, {high:+.1f}]"

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
            gains = [{k: 100 * v for k, v in own[arm].items()} for own in kept.values()]
            rows.append(
                [named(arm), *(f"{g['mean']:+.1f} [{g['low']:+.1f}, {g['high']:+.1f}]"
                               for g in gains)]
            )  # fmt: skip
        heads = [f"{part}: gain in points", *(f"the {order} third" for order in kept)]
        lines += [*table(heads, rows), ""]
    return lines + study.missing("main", "loop")


def curvature(study: Study, claims: Values) -> Table:
    """L-BFGS in the loop: how often it acts, how large it is, and what it changes."""
    own = claims["L-BFGS"]
    low, middle, high = own["step over factor"]
    return [
        f"- On {own['questions']} questions of the pilot, three answers each, a layer held a pair "
        f"in {own['with a pair']}; in the others L-BFGS changed nothing.",
        f"- There the step `1e-3 · H B̃` has a norm of {low:.2g} to {high:,.0f} times that of `B̃`, "
        f"{middle:.2g} in the median layer; it is larger than `B̃` in "
        f"{own['steps above the factor']} of {own['layers with a pair, of those']} layers.",
        "",
        *compared(study.found("loop", ACCURACY, CURVATURE), ACCURACY, against=True),
        *study.missing("loop"),
        "",
        where(claims["facts"], claims["settings"]["seed"]),
    ]


def bound(claims: Values) -> Table:
    """The bounds of proposition 4.1 on every layer."""
    heads = [
        "", "groups", "above `√r·τ`", "in layers", "largest over `√r·τ`", "above `r·τ`",
        "`‖Ã‖₂‖B̃‖₂` above `√r·τ`",
    ]  # fmt: skip
    rows = []
    for name, kinds in claims["updates"].items():
        own = kinds["all"]
        rows.append(
            [
                name, f"{own['groups']:,}", f"{own['above √r·τ']:,}",
                f"{own['layers above √r·τ']} of {own['layers']}",
                f"{own['largest over √r·τ']:.2f}", f"{own['above r·τ']}",
                f"{own['‖Ã‖‖B̃‖ above √r·τ']:,}",
            ]
        )  # fmt: skip
    return [*table(heads, rows), "", where(claims["facts"], claims["settings"]["seed"])]


def policy(claims: Values) -> Table:
    """How far γ, rank and features depend on the input."""
    heads = [
        "", "σ above .95", "σ below .05", "γ in a layer varies by (median)",
        "inputs", "outputs", "update over H: median, largest",
    ]  # fmt: skip
    rows = []
    for name, kinds in claims["updates"].items():
        own = kinds["all"]
        rows.append(
            [
                name, *(f"{100 * own[key]:.0f} %" for key in ("σ above 0.95", "σ below 0.05")),
                f"{own['range of γ in a layer, median']:.3f}",
                *(f"{100 * own[f'choices on the most frequent {side}']:.0f} %"
                  for side in ("inputs", "outputs")),
                f"{own['update over H'][0]:.3f}, {own['update over H'][2]:.3f}",
            ]
        )  # fmt: skip
    return table(heads, rows)


def overhead(sections: Values) -> Table:
    """Times of layers over nn.Linear."""
    heads = ["time over `nn.Linear`", "noise", "as published", "VPS, `torch`", "VPS, `cpp`"]
    rows = []
    for dtype in ("float32", "bfloat16"):
        for tokens in (1, 32, 256):
            case = sections["layer"]["cases"][f"geometric mean, N = {tokens}, {dtype}"]
            low, high = results.noise(case) or (1.0, 1.0)
            own = [results._cell(case["rows"][name]) for name in VARIANTS]
            rows.append([f"{tokens} tokens, {dtype}", f"{low:.2f} to {high:.2f}", *own])
    facts = sections["layer"]["machine"]
    place = f"{facts['cpu']}, {facts['instructions']}, {facts['threads']} threads, torch "
    return [*table(heads, rows), "", f"{place}{facts['torch']}, commit {facts['commit']}."]


def blocks(folder: Path) -> dict[str, Callable[[], Table]]:
    """Return what makes each table from the result files of a folder, by its name."""
    path = folder / "reproduction/findings.json"
    study = Study(json.loads(path.read_text()) if path.exists() else None)
    (own,) = (folder / "claims").glob("*.json")
    claims = json.loads(own.read_text())
    made: dict[str, Callable[[], Table]] = {
        each.__name__: lambda each=each: each(study)
        for each in (gain, guidance, generated, prose, coupling, loop, selection)
    }
    return made | {
        "curvature": lambda: curvature(study, claims),
        "bound": lambda: bound(claims),
        "policy": lambda: policy(claims),
        "overhead": lambda: overhead(results.read(folder / TIMES)),
    }


def filled(text: str, folder: Path) -> str:
    """Return a page with its tables of the results in a folder.

    Raises:
        KeyError: the page asks for a table that does not exist.
    """
    made = blocks(folder)

    def fill(match: re.Match[str]) -> str:
        lines = "\n".join(made[match[2]]()).strip("\n")
        return f"{match[1]}\n{lines}\n\n{match[3]}"

    return BLOCK.sub(fill, text)


def main() -> None:
    """Fill the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    files.replace(given.page, filled(given.page.read_text(), given.results))
    print(given.page)


if __name__ == "__main__":
    main()
