"""The folder of an ablation: what was asked for, and one line a finished cell, safe to kill.

``run.json`` holds the definition of the run, ``cells-RANK.jsonl`` what the process of that rank
finished, ``lock`` nothing: its bytes are locked, one a cell, by the process that works on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vps import jsonl
from vps.evaluation.grid import Cell, Grid
from vps.evaluation.outcome import Outcome

FORMAT = "vps-ablation-1"
BEGINNING = '{"cell": 0, "seconds": '  # of every line of a shard
MOST_DIFFERENCES = 6
OPENING = 2**40  # the byte of the lock, past those of all cells, held while run.json is compared


class RunError(ValueError):
    """The folder holds another run, or none, or another process works on it."""


@dataclass(frozen=True)
class Record:
    """What came of one cell.

    Args:
        cell: its index.
        outcomes: of its documents; empty where it failed.
        seconds: of wall-clock time.
        first: whether it was the first of its process, whose seconds hold what is done once.
        facts: machine and versions.
        scopes: that ran, by kind of request.
        error: why it failed, or ``None``.
    """

    cell: int
    outcomes: tuple[Outcome, ...]
    seconds: float
    first: bool
    facts: Mapping[str, Any]
    scopes: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """What a folder holds: the grid, the definition, and records by the cell's index."""

    title: str
    cells: tuple[Cell, ...]
    definition: Mapping[str, Any]
    records: Mapping[int, Record]

    @property
    def finished(self) -> dict[int, Record]:
        """The records of cells that did not fail."""
        return {index: record for index, record in self.records.items() if record.error is None}


def definition_of(grid: Grid, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run the same run, as it stands in ``run.json``."""
    return {
        "format": FORMAT,
        "title": grid.title,
        "settings": json.loads(json.dumps(settings)),
        "cells": [cell.as_dict() for cell in grid.cells],
    }


def read_run(folder: Path) -> Run:
    """The run of a folder, finished or not; nothing is changed.

    Raises:
        RunError: no run there, or files that are not of one.
        OSError: a file cannot be read.
    """
    path = folder / "run.json"
    try:
        definition = jsonl.parse_object(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"{folder} holds no run: expected {path}, which `vps ablate` makes") from (
            None
        )
    if definition is None or definition.get("format") != FORMAT:
        raise RunError(f"{path} is not of the format {FORMAT}")
    cells = tuple(Cell.from_dict(values) for values in definition["cells"])
    records: dict[int, Record] = {}
    for shard in sorted(folder.glob("cells-*.jsonl")):
        for number, values in enumerate(_rows(shard)[0], 1):
            try:
                record = _record(values)
            except (KeyError, TypeError, ValueError):
                raise RunError(f"{shard}: row {number} is no result of a cell") from None
            if record.cell not in range(len(cells)):
                raise RunError(f"{shard}: row {number} is of no cell of {path}")
            kept = records.get(record.cell)
            if kept is None or kept.error is not None:
                records[record.cell] = record
    return Run(definition["title"], cells, definition["settings"], dict(sorted(records.items())))


def own_cells(count: int, rank: int, world: int) -> range:
    """Indices of the cells that the process of a rank takes: every ``world``-th."""
    return range(rank, count, world)


@contextlib.contextmanager
def writing(
    folder: Path, definition: Mapping[str, Any], rank: int = 0, world: int = 1
) -> Iterator[Path]:
    """Hold the cells of a rank, in a folder that is of this run; gives the file to append to.

    Raises:
        RunError: another process works on one of these cells, or the folder holds another run, with
            what differs.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("ab") as lock:  # released by its end, of whatever kind
        for index in own_cells(len(definition["cells"]), rank, world):
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)
            except (BlockingIOError, PermissionError):
                raise RunError(
                    f"another process is writing to {folder} (it works on cell {index}); wait for "
                    "its end, or choose another folder"
                ) from None
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, OPENING)
        _check(folder, definition)
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, OPENING)
        shard = folder / f"cells-{rank}.jsonl"
        if shard.exists():
            jsonl.cut(shard, _rows(shard)[1])
        else:
            shard.touch()
            _sync(folder)
        yield shard


def wait_for_others(folder: Path) -> None:
    """Return once no process works on a cell of the folder; this one must hold none."""
    with (folder / "lock").open("ab") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX, OPENING, 0)


def line_of(record: Record) -> dict[str, Any]:
    """A record as a line of a shard; outcomes are columns, one group a task and metric."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in record.outcomes:
        groups.setdefault((outcome.task, outcome.metric), []).append(outcome)
    return {
        "cell": record.cell,
        "seconds": round(record.seconds, 3),
        "first": record.first,
        "error": record.error,
        "facts": dict(record.facts),
        "scopes": dict(record.scopes),
        "outcomes": [
            {
                "task": task,
                "metric": metric,
                "document": [each.document for each in group],
                "value": [each.value for each in group],
                "margin": _unless(None, [each.margin for each in group]),
                "weight": _unless(1.0, [each.weight for each in group]),
            }
            for (task, metric), group in groups.items()
        ],
    }


def check_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Refuse what no statistics can be made of.

    Raises:
        ValueError: none at all, a document twice, or a value that is not finite.
    """
    if not outcomes:
        raise ValueError("the evaluation gave no outcome")
    seen = set()
    for each in outcomes:
        where = f"{each.metric} of document {each.document!r} of {each.task}"
        if (each.task, each.metric, each.document) in seen:
            raise ValueError(f"{where} comes twice")
        seen.add((each.task, each.metric, each.document))
        if not math.isfinite(each.value) or not math.isfinite(each.weight) or each.weight <= 0:
            raise ValueError(
                f"{where} is {each.value} with weight {each.weight}, expected finite numbers and a "
                "positive weight"
            )


def _unless(usual: float | None, values: list[Any]) -> list[Any] | None:
    return None if all(value == usual for value in values) else values


def _record(values: Mapping[str, Any]) -> Record:
    outcomes = []
    for group in values["outcomes"]:
        count = len(group["document"])
        columns = (
            group["document"],
            group["value"],
            group["margin"] or [None] * count,
            group["weight"] or [1.0] * count,
        )
        for document, value, margin, weight in zip(*columns, strict=True):
            outcomes.append(
                Outcome(group["task"], document, group["metric"], value, margin, weight)
            )
    return Record(
        values["cell"],
        tuple(outcomes),
        values["seconds"],
        values["first"],
        values["facts"],
        values["scopes"],
        values["error"],
    )


def _rows(shard: Path) -> tuple[list[dict[str, Any]], int]:
    try:
        return jsonl.read_objects(shard, BEGINNING)
    except jsonl.BrokenLineError as error:
        raise RunError(str(error)) from None


def _check(folder: Path, definition: Mapping[str, Any]) -> None:
    """Make ``run.json``, or compare with the one that is there."""
    path = folder / "run.json"
    if not path.exists():
        if next(folder.glob("cells-*.jsonl"), None) is not None:
            raise RunError(f"{folder} holds cells but no run.json")
        if (folder / "table.md").exists():
            raise RunError(f"{folder} holds table.md, but no run.json that it would be of")
        jsonl.replace(path, json.dumps(definition, ensure_ascii=False) + "\n")
        _sync(folder)
        return
    before = jsonl.parse_object(path.read_bytes())
    if before is None or before.get("format") != FORMAT or not set(definition) <= set(before):
        raise RunError(f"{path} is not of the format {FORMAT}")
    found = differences(before, definition)
    if found:
        shown = "; ".join(found[:MOST_DIFFERENCES])
        more = len(found) - MOST_DIFFERENCES
        raise RunError(
            f"{folder} holds another run: {shown}{f'; and {more} more' if more > 0 else ''}. "
            "Choose another folder, or take the change back"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two definitions of a run differ in, in words."""
    found = []
    settings = [each["settings"] for each in (before, now)]
    for name in dict.fromkeys([*settings[0], *settings[1]]):
        there, here = (each.get(name) for each in settings)
        if there != here:
            found.append(f"{name} is {there!r} there, {here!r} here")
    cells = [{cell["name"]: cell for cell in each["cells"]} for each in (before, now)]
    for place, one, other in (("there", *cells), ("here", *reversed(cells))):
        names = [name for name in one if name not in other]
        if names:
            listed = ", ".join(repr(name) for name in names[:3]) + (", …" if names[3:] else "")
            found.append(f"{len(names)} cells only {place}: {listed}")
    both = [name for name in cells[0] if name in cells[1]]
    for name in both:
        there, here = (_flat(each[name]) for each in cells)
        changed = [f"{key} {there[key]!r} there, {here.get(key)!r} here"
                   for key in there if there[key] != here.get(key)]  # fmt: skip
        if changed:
            found.append(f"cell {name!r}: {', '.join(changed)}")
    if not found and list(cells[0]) != list(cells[1]):
        found.append("the cells are in another order")
    if before["title"] != now["title"]:
        found.append(f"title is {before['title']!r} there, {now['title']!r} here")
    return found


def _flat(cell: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: cell[key] for key in ("control", "draw", "of")}
    return values | dict(cell["config"] or {})


def _sync(folder: Path) -> None:
    """Make the folder's own entries durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
