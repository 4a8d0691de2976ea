"""Name what got slower, or larger, from one result file to another, beyond noise.

``python -m benchmarks.regress OLD.json NEW.json`` exits with 1 if anything did, and with 2 if the
files are of different machines. A ratio to the base of its own run is compared, so a machine that
is slower as a whole is no regression. The band is that of both A/A ratios together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import results
from benchmarks.machine import COMPARED
from benchmarks.results import Case, Section

MOST_BYTES = 1.01


class Change(NamedTuple):
    """Hold one variant of one case: what it was, what it is, and how far noise reaches."""

    where: str
    old: float
    new: float
    band: float
    unit: str

    def factor(self) -> float:
        """Return new over old."""
        return self.new / self.old

    def __str__(self) -> str:
        numbers = f"{self.old:.4g} to {self.new:.4g}{self.unit}"
        return f"{self.where}: {numbers}, a factor of {self.factor():.3f} (noise {self.band:.3f})"


def different_machine(old: Section, new: Section) -> str | None:
    """Say what of the machine differs, or ``None``."""
    parts = [
        f"{key} {old['machine'].get(key)!r} and {new['machine'].get(key)!r}"
        for key in COMPARED
        if old["machine"].get(key) != new["machine"].get(key)
    ]
    return ", ".join(parts) or None


def changes(old: Section, new: Section) -> Iterator[Change]:
    """Yield every figure that both sections hold."""
    for title, case in new["cases"].items():
        before = old["cases"].get(title)
        if before is None or before["base"] != case["base"]:
            continue
        band = width(before) * width(case)
        for variant, row in case["rows"].items():
            was = before["rows"].get(variant, {})
            where = f"{title}: {variant}"
            if variant in (case["base"], case["base"] + results.AGAIN) and "bytes" not in row:
                continue
            if "ratio_q1" in row and "ratio_q1" in was:
                yield Change(where, was["ratio"], row["ratio"], band, "×")
            if row.get("bytes", 0) > 0 and was.get("bytes", 0) > 0:
                yield Change(where, was["bytes"], row["bytes"], MOST_BYTES, " bytes")


def lost(old: Section, new: Section) -> Iterator[str]:
    """Yield what was measured before and is not any more, or is wrong now."""
    for title, case in old["cases"].items():
        for variant, row in case["rows"].items():
            now = new["cases"].get(title, {}).get("rows", {}).get(variant)
            if "empty" not in row and (now is None or "empty" in now):
                reason = "not in the new file" if now is None else now["empty"]
                yield f"{title}: {variant}: {reason}"


def width(case: Case) -> float:
    """Return how far the A/A ratio strays from 1, as a factor; 1 where it was not measured."""
    band = results.noise(case)
    return 1.0 if band is None else max(1.0, band[1], 1 / band[0])


def compare(old: dict[str, Section], new: dict[str, Section]) -> tuple[list[str], list[str]]:
    """Return ``(slower, notes)``: lines for what got worse, and for what else changed.

    Raises:
        ValueError: no section in common.
    """
    names = sorted(old.keys() & new.keys())
    if not names:
        raise ValueError(f"no section in common: {sorted(old)} and {sorted(new)}")
    slower, notes = [], []
    for name in names:
        for key in ("torch", "triton", "commit"):
            versions = (old[name]["machine"].get(key), new[name]["machine"].get(key))
            if versions[0] != versions[1]:
                notes.append(f"{name}: {key} {versions[0]} before, {versions[1]} now")
        for change in changes(old[name], new[name]):
            if change.factor() > change.band:
                slower.append(f"{name}: {change}")
            elif change.factor() < 1 / change.band:
                notes.append(f"{name}: better: {change}")
        for line in lost(old[name], new[name]):
            (slower if ": wrong: " in line else notes).append(f"{name}: not measured now: {line}")
    return slower, notes


def main() -> None:
    """Compare two files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--other-machine", action="store_true", help="compare ratios of different machines anyway"
    )
    arguments = parser.parse_args()
    old, new = results.read(arguments.old), results.read(arguments.new)
    for name in sorted(old.keys() & new.keys()):
        reason = different_machine(old[name], new[name])
        if reason is not None and not arguments.other_machine:
            print(f"{name}: refused, measured on different machines: {reason}")
            sys.exit(2)
    slower, notes = compare(old, new)
    print(*notes, *(f"SLOWER {line}" for line in slower), sep="\n")
    print(f"{len(slower)} worse beyond noise")
    sys.exit(1 if slower else 0)


if __name__ == "__main__":
    main()
