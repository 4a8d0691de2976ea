"""Measure everything that this machine can, within a time: ``python -m benchmarks --minutes 14``.

Writes one JSON file named after the machine, and beside it the tables as Markdown. Sections are
saved as they finish; what there was no time for stays empty and says so.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks import common, machine, results
from benchmarks.common import Budget
from benchmarks.models import backward, block, layer, memory, model, scaling
from benchmarks.ops import __main__ as ops
from benchmarks.ops import roofline
from benchmarks.results import Section

# Shares of the time; what a section does not use goes to those after it.
SHARES = {
    "cpu": {
        "layer": 41, "model": 25, "backward": 6, "memory": 2, "ops": 7, "block": 8, "scaling": 11,
    },
    "cuda": {
        "layer": 38, "ops": 17, "block": 12, "model": 16, "backward": 3, "memory": 3, "scaling": 11,
    },
}  # fmt: skip


def run(name: str, seconds: float, model_dir: Path) -> Section | dict[str, Section]:
    """Run one benchmark by name."""
    if name in ("model", "backward"):
        return {"model": model, "backward": backward}[name].run(seconds, model_dir)

    modules = {"ops": ops, "memory": memory, "layer": layer, "block": block, "scaling": scaling}
    return modules[name].run(seconds)


def everything(out: Path, minutes: float, model_dir: Path, only: list[str]) -> list[str]:
    """Measure and write, and return what failed."""
    budget = Budget(60 * minutes)
    path = out / f"{machine.name()}.json"
    shares = {n: s for n, s in SHARES[machine.device()].items() if not only or n in only}
    failed = []
    for number, (name, share) in enumerate(shares.items()):
        rest = sum(list(shares.values())[number:])
        start = time.monotonic()
        print(f"== {name}, about {budget.left() * share / rest:.0f} s", flush=True)
        try:
            failed += common.keep(path, name, run(name, budget.left() * share / rest, model_dir))
        except Exception as error:  # the sections after it are still to be had
            failed.append(f"{name}: {type(error).__name__}: {error}")
        took, left = time.monotonic() - start, budget.left()
        print(f"== {name} took {took:.0f} s, {left:.0f} s left", flush=True)
    write_tables(path)
    return failed


def write_tables(path: Path) -> None:
    """Write ``<machine>.md`` beside the result file: ratios, roofline, memory."""
    if not path.exists():
        return
    sections = results.read(path)
    lines = [f"# {path.stem}"]
    for name, section in sections.items():
        lines += ["", f"## {name}", ""]
        if name == "memory":
            lines += memory_table(section)
        elif name == "ops":
            lines += [roofline.table(section["cases"], section["peaks"])]
        else:
            lines += [results.ratios(section, "")]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(path.with_suffix(".md"))


def memory_table(section: Section) -> list[str]:
    """List peaks in MiB, a case a row."""
    names = list(dict.fromkeys(n for case in section["cases"].values() for n in case["rows"]))
    lines = [f"| MiB over the base | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for title, case in section["cases"].items():
        cells = [
            f"{row['bytes'] / 2**20:.2f}" if "bytes" in row else "not measured"
            for row in (case["rows"].get(name, {}) for name in names)
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Exit with 1 if a check failed or a benchmark broke."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=14)
    parser.add_argument("--model-dir", type=Path, default=Path(".cache/smollm2"))
    parser.add_argument("--only", nargs="+", default=[], choices=sorted(SHARES["cpu"]))
    arguments = parser.parse_args()
    failed = everything(arguments.out, arguments.minutes, arguments.model_dir, arguments.only)
    sys.exit("\n".join(failed) or None)


if __name__ == "__main__":
    main()
