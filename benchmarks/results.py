"""Keep result files: one JSON file a machine, with one section a benchmark.

``python -m benchmarks.results FOLDER REGEX --section layer`` prints a table for a README.

A section holds machine, clocks and ``cases``; a case its ``base`` and ``rows`` by variant; a row
what was measured, or ``{"empty": reason}``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FORMAT = "vps-benchmarks-1"
VISIT = "vps-visit-1"  # of one visit to a GPU (benchmarks.gpu), whose sections hold "lines"
AGAIN = " again"  # what the second, identical base of the A/A band is called

Row = dict[str, Any]
Case = dict[str, Any]
Section = dict[str, Any]


def empty(reason: str) -> Row:
    """Return a cell that was not measured, and why."""
    return {"empty": reason}


def case(base: str, rows: dict[str, Row]) -> Case:
    """Return a case as files hold it."""
    return {"base": base, "rows": rows}


def unmeasured(base: str, reason: str) -> Case:
    """Return a case without a measurement, and why."""
    return case(base, {base: empty(reason)})


def noise(case: Case) -> tuple[float, float] | None:
    """Return the quartiles of the A/A ratio, or ``None`` where it was not measured."""
    row = case["rows"].get(case["base"] + AGAIN, {})
    return (row["ratio_q1"], row["ratio_q3"]) if "ratio_q1" in row else None


def read(path: Path, form: str = FORMAT) -> dict[str, Section]:
    """Return the sections of a file.

    Raises:
        ValueError: not a result file of this format.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != form:
        raise ValueError(f"{path} is no result file of {form}")
    return content["sections"]


def read_folder(folder: Path) -> dict[str, dict[str, Section]]:
    """Return the sections of every result file in a folder, by file name without its suffix.

    Raises:
        FileNotFoundError: no result file there.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = read(path)
        except ValueError as error:
            print(f"left out: {error}")
    if not found:
        raise FileNotFoundError(f"no result file in {folder}")
    return found


def merged(folder: Path, gpu: bool) -> dict[str, Section]:
    """Return the sections of a folder that were measured with, or without, a GPU."""
    found: dict[str, Section] = {}
    for sections in read_folder(folder).values():
        for name, section in sections.items():
            if (section["machine"]["gpu"] is not None) == gpu:
                found[name] = section
    return found


def save(path: Path, name: str, section: Section, form: str = FORMAT) -> None:
    """Put one section into a file, in place of an older one of that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sections = read(path, form) if path.exists() else {}
    sections[name] = section
    content = {"format": form, "sections": dict(sorted(sections.items()))}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def lines(case: Case) -> Iterable[str]:
    """Yield a case as text, a row a line, with the noise band beside every ratio."""
    band = noise(case)
    beside = "" if band is None else f"   (noise {band[0]:.3f} to {band[1]:.3f})"
    for variant, row in case["rows"].items():
        if "empty" in row:
            yield f"  {variant:<26} -- {row['empty']}"
            continue
        parts = []
        if "seconds" in row:
            parts.append(f"{row['seconds'] * 1e3:10.4f} ms")
        if "ratio_q1" in row:
            parts.append(f"{row['ratio']:.3f}× [{row['ratio_q1']:.3f}, {row['ratio_q3']:.3f}]")
            parts.append(beside.strip() if variant != case["base"] else "")
        elif "ratio" in row:
            parts.append(f"{row['ratio']:.3f}× modelled")
        if "bytes" in row:
            parts.append(f"{row['bytes'] / 2**20:10.3f} MiB")
        yield f"  {variant:<26} " + "   ".join(parts).rstrip()


def ratios(section: Section, cases: str, variants: list[str] | None = None) -> str:
    """Write Markdown for a README: a case a row, a variant a column; empty cells stay empty."""
    chosen = {t: c for t, c in section["cases"].items() if re.search(cases, t)}
    names = variants or list(
        dict.fromkeys(
            name
            for case in chosen.values()
            for name, row in case["rows"].items()
            if "ratio" in row and name not in (case["base"], case["base"] + AGAIN)
        )
    )
    lines = [f"| | noise | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for title, case in chosen.items():
        band = noise(case)
        cells = ["not measured" if band is None else f"{band[0]:.2f} to {band[1]:.2f}"]
        for name in names:
            row = case["rows"].get(name, {})
            cells.append("" if "ratio" not in row else _cell(row))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if "ratio_q1" not in row:
        return f"{row['ratio']:.2f} (modelled)"
    return f"{row['ratio']:.2f} [{row['ratio_q1']:.2f}, {row['ratio_q3']:.2f}]"


def main() -> None:
    """Print the ratios of the cases that match, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="?", default="", help="regular expression for titles")
    parser.add_argument("--section", default="layer")
    parser.add_argument("--gpu", action="store_true", help="results of a GPU")
    parser.add_argument("--variants", nargs="+", help="the columns")
    given = parser.parse_args()
    section = merged(given.folder, given.gpu)[given.section]
    print(ratios(section, given.cases, given.variants))


if __name__ == "__main__":
    main()
