"""Refine the rows of a JSONL file into another, which can be continued after any interruption.

A row in is ``{"prompt": …, "gold"?: …, "id"?: …}``; a row out is what :func:`vps.refine` gave for
it, or its error, with its number and the settings of the run.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vps import files
from vps.config import VPSConfig
from vps.refine import refine

BEGINNING = '{"row": 0, "id": '  # of every row out


class ContinuationError(ValueError):
    """The output file is not of this run."""


@dataclass(frozen=True)
class Row:
    """One line: its number from 1, its parts, and why it cannot be used, or ``None``."""

    number: int
    prompt: str = ""
    gold: str | None = None
    id: Any = None
    error: str | None = None


@dataclass(frozen=True)
class BatchResult:
    """How many rows were refined, failed, and had been finished before."""

    refined: int
    failed: int
    skipped: int


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, broken ones with their error; empty lines are none.

    Raises:
        OSError: the file cannot be read.
    """
    return [_row(number, line) for number, line in files.lines(path)]


def finished_rows(path: Path, rows: list[Row], settings: Mapping[str, Any]) -> set[int]:
    """Numbers of the rows that an output file holds, after its cut last line is removed from it.

    Raises:
        ContinuationError: the file is no output of these rows with these settings.
        OSError: the file cannot be read or shortened.
    """
    if not path.exists():
        return set()
    try:
        records, end = files.read_objects(path, BEGINNING)
    except files.BrokenLineError as error:
        raise ContinuationError(str(error)) from None
    finished, known = set(), {row.number: row for row in rows}
    wanted = json.loads(json.dumps(settings))
    for place, record in enumerate(records, 1):
        number, made = record.get("row"), record.get("settings")
        row = known.get(number) if isinstance(number, int) else None
        if row is None or record.get("prompt") != row.prompt or record.get("gold") != row.gold:
            raise ContinuationError(f"{path}: line {place} is not of a row of this input")
        for name, value in wanted.items():
            came = made.get(name) if isinstance(made, dict) else None
            if came != value and not (name == "config" and _mean_the_same(came, value)):
                raise ContinuationError(
                    f"{path}: line {place} was made with {name} {came!r}, not {value!r}"
                )
        finished.add(row.number)
    files.cut(path, end)
    return finished


def _mean_the_same(*configs: Any) -> bool:
    """Whether two configs are equal as settings; earlier versions wrote what was left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one, other = (VPSConfig.from_json(json.dumps(config)) for config in configs)
    except (TypeError, ValueError):
        return False
    return one == other


def refine_rows(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    out: Path,
    *,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    advance: Callable[[], None] | None = None,
) -> BatchResult:
    """Refine every row that ``out`` does not hold, each written as soon as it is done.

    A row that fails is written with its error and counts as finished: remove its line to try it
    again.

    Args:
        model, tokenizer: as for :func:`vps.refine`.
        rows: of :func:`read_rows`.
        out: the output file; continued if it is there.
        settings: what the run is, for JSON; written to each row and compared on continuing.
        options: keyword arguments of :func:`vps.refine`.
        advance: called after every row, finished ones too.

    Raises:
        ContinuationError: ``out`` is not of this run.
        OSError: ``out`` cannot be written.
    """
    finished = finished_rows(out, rows, settings)
    say = advance or (lambda: None)
    refined = failed = 0
    for row in rows:
        if row.number not in finished:
            record = _refined(model, tokenizer, row, options)
            failed += "error" in record
            refined += "error" not in record
            files.append(out, record | {"settings": settings})
        say()
    return BatchResult(refined, failed, len(finished))


def _refined(model: Any, tokenizer: Any, row: Row, options: Mapping[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "row": row.number,
        "id": row.id,
        "prompt": row.prompt,
        "gold": row.gold,
    }
    labelled = row.gold is not None and options.get("iterations", 2) >= 2
    if row.error is not None:
        return record | {"error": row.error, "used_labels": False}
    try:
        return record | refine(model, tokenizer, row.prompt, row.gold, **options).as_dict()
    except Exception as error:  # whatever a row brings up must not end the others
        reason = " ".join(str(error).split())
        return record | {
            "error": f"{type(error).__name__}: {reason}",
            "used_labels": labelled,
        }


def _row(number: int, line: bytes) -> Row:
    values = files.parse_object(line)
    if values is None:
        return Row(number, error=files.why_none(line))
    prompt, gold = values.get("prompt"), values.get("gold")
    found = Row(
        number,
        prompt if isinstance(prompt, str) else "",
        gold if isinstance(gold, str) else None,
        values.get("id"),
    )
    for name, value in (("prompt", prompt), ("gold", gold)):
        if not isinstance(value, str) and (name == "prompt" or value is not None):
            came = type(value).__name__ if name in values else "nothing"
            error = f"{name!r} must be a string, got {came}"
            return Row(found.number, found.prompt, found.gold, found.id, error)
    return found
