"""Fill the tables of docs/reproduction.md from result files: ``python -m benchmarks.study.page``.

A table stands between ``<!-- results: NAME -->`` and ``<!-- /results -->``. What is not measured
yet is said in its place. The picture of the study is copied into docs/images.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from scipy import stats

from benchmarks import results
from benchmarks.reproduce.findings import CONTROLS, COUPLING, CURVATURE, NULLS, PLAIN
from benchmarks.reproduce.measures import ACCURACY, BEST
from benchmarks.study import answers
from benchmarks.study.answers import Study, Table, Values, compared, table, where
from vps import files

PAGE, RESULTS = Path("docs/reproduction.md"), Path("benchmarks/results")
PICTURE, STUDY = "images/study.png", "reproduction"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- /results -->)", re.S)
TIMES = "spinning/amd-epyc-avx512-2-threads-spinning.json"
VARIANTS = ("published form, eager", "vps torch", "vps cpp")


def curvature(study: Study, claims: Values) -> Table:
    """L-BFGS in the loop: how often it acts, how large it is, and what it changes."""
    own = claims["L-BFGS"]
    low, middle, high = own["step over factor"]
    share = stats.binomtest(own["with a pair"], own["questions"]).proportion_ci()
    return [
        f"- On {own['questions']} questions of the pilot, three answers each, a layer held a pair "
        f"in {own['with a pair']} ({100 * share.low:.0f} to {100 * share.high:.0f} %, exact 95 % "
        "interval); in the others L-BFGS changed nothing.",
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
            rows.append(
                [f"{tokens} token{'s' * (tokens > 1)}, {dtype}", f"{low:.2f} to {high:.2f}", *own]
            )
    facts = sections["layer"]["machine"]
    place = f"{facts['cpu']}, {facts['instructions']}, {facts['threads']} threads, torch "
    return [*table(heads, rows), "", f"{place}{facts['torch']}, commit {facts['commit']}."]


def as_published(sections: Values) -> str:
    """Say how much more time a layer takes, as published and here."""
    cases = [sections["layer"]["cases"][f"geometric mean, N = {n}, float32"] for n in (256, 1)]
    ends = (
        " to ".join(f"{case['rows'][name]['ratio']:.2f}" for case in cases)
        for name in (VARIANTS[0], VARIANTS[-1])
    )
    said = "as published {} times `nn.Linear` with 256 to 1 tokens; `cpp` {}"
    return said.format(*ends)


def claims_of(study: Study, claims: Values, times: Values) -> Table:
    """Say of every claim what holds here, in a line."""

    def verdicts(part: str, metric: str, family: str) -> str:
        rows = study.found(part, metric, family)
        return "; ".join(
            f"scope {e['comparison']['cell'].rpartition(', ')[2]}: {e['verdict']} ("
            f"{100 * e['comparison']['difference']:+.1f} points)".replace("-", "−")
            for e in rows
        ) or pending(part)

    def pending(part: str) -> str:
        return study.missing(part)[-1].strip("*") if study.missing(part) else ""

    def against() -> str:
        found = Counter(e["verdict"] for e in study.found("main", ACCURACY, CONTROLS))
        said = ", ".join(f"{count} {verdict}" for verdict, count in found.most_common())
        return f"against its controls, {found.total()} comparisons: {said}" if found else ""

    def kept() -> str:
        own = study.parts.get("main", {}).get("selected", {}).get("hardest", {})
        return "; ".join(
            f"{name} {100 * own[name]['mean']:+.1f}".replace("-", "−")
            for name in own if "·" not in name and not name.startswith("no coupling")
        )  # fmt: skip

    def looped(metric: str) -> str:
        rows = [e for f in (PLAIN, NULLS) for e in study.found("loop", metric, f)]
        gains = [100 * e["comparison"]["difference"] for e in rows]
        nulls = gains[-len(study.found("loop", metric, NULLS)) :]
        return f"{gains[0]:+.1f}, controls {min(nulls):+.1f} to {max(nulls):+.1f}".replace("-", "−")

    refined = pending("loop") or (
        f"points over plain: last answer {looped(ACCURACY)}; lowest loss {looped(BEST)}"
    )
    own = claims["updates"]["paper, token"]["all"]
    over, most = own["layers above √r·τ"], own["largest over √r·τ"]
    curve, every = claims["L-BFGS"], claims["updates"]
    ranges = [
        f"{every[f'paper, {scope}']['all']['range of γ in a layer, median']:.2f}"
        for scope in ("token", "prompt")
    ]
    rows = [
        ("accuracy rises on reasoning tasks", "abstract, §7.1", "accuracy",
         verdicts("main", ACCURACY, PLAIN)),
        ("features chosen by activations matter", "§3.3, §7.1", "guidance",
         against() or pending("main")),
        ("the most challenging questions show it", "§6.1", "the-papers-selection",
         f"mean gain on the hardest third, in points: {kept()}" if kept() else pending("main")),
        ("answering again improves the answer", "§3.7, §7.1", "refinement", refined),
        ("coupling keeps queries and keys aligned", "§3.8", "coupling",
         verdicts("main", ACCURACY, COUPLING)),
        ("L-BFGS: \"may be minimal\"", "§7.2", "l-bfgs",
         f"rare, then large: it acts in {curve['with a pair']} of {curve['questions']} questions"),
        ("the norm of the update is at most `√r·τ`", "§4.1", "the-bound-of-the-norm",
         f"no: above it in {over} of {own['layers']} layers, up to {most:.2f} times; `r·τ` holds"),
        ("\"approximately 5-15% overhead\"", "§5.4", "overhead", as_published(times)),
        ("rank and γ follow the input", "§3.5", "adaptation",
         f"in part: γ of the median layer varies by {ranges[0]} under scope token, by {ranges[1]} "
         "under prompt"),
    ]  # fmt: skip
    return table(
        ["claim", "where", "what holds here"],
        ([f"[{claim}](#{anchor})", place, found] for claim, place, anchor, found in rows),
    )


def picture(study: Study) -> Table:
    """The picture of the study."""
    if "main" not in study.parts:
        return study.missing("main")
    return [
        "![Differences of all settings and their controls from the plain model, with 95 % "
        f"intervals]({PICTURE})"
    ]


def again(folder: Path) -> Table:
    """How many answers of the plain model another machine gives, if that was asked."""
    path = folder / STUDY / "again.json"
    if not path.exists():
        return []
    values = json.loads(path.read_text())
    own, first, other = values["found"], values["first"], values["again"]
    return [
        f"*main* was begun on one machine ({first['cpu']}) and finished on another "
        f"({other['cpu']}). There the plain model answered its {own['answers']:,} questions once "
        f"more: {own['that differ']} are right on one machine alone; a margin moved by up to "
        f"{own['largest change of a margin']:.3f} nats."
    ]


def blocks(folder: Path) -> dict[str, Callable[[], Table]]:
    """Return what makes each table from the result files of a folder, by its name."""
    times = results.read(folder / TIMES)
    path = folder / STUDY / "findings.json"
    study = Study(json.loads(path.read_text()) if path.exists() else None)
    (own,) = (folder / "claims").glob("*.json")
    claims = json.loads(own.read_text())
    made: dict[str, Callable[[], Table]] = {
        each.__name__: lambda each=each: each(study) for each in (*answers.TABLES, picture)
    }
    return made | {
        "again": lambda: again(folder),
        "claims": lambda: claims_of(study, claims, times),
        "curvature": lambda: curvature(study, claims),
        "bound": lambda: bound(claims),
        "policy": lambda: policy(claims),
        "overhead": lambda: overhead(times),
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
    drawn = given.results / STUDY / "answers.png"
    if drawn.exists():
        shutil.copy(drawn, given.page.parent / PICTURE)
    print(given.page)


if __name__ == "__main__":
    main()
