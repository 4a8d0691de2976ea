"""Evaluate the cells of a grid into a folder that can be killed, continued and shared.

``run.json`` holds the definition of the run, ``cells/INDEX.json`` what came of one cell, and
``table.md`` what is finished. ``lock`` is held while a process begins, and ``lock-RANK-of-WORLD``
by the process of that rank until its end. A folder of version 0.1 has its cells as lines of
``cells-RANK.jsonl``, which are read and never written to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vps import files
from vps.doctor import package_version, processor_name
from vps.evaluation.grid import BASELINE, FORMAT, Cell, Grid, definition_of, differences
from vps.evaluation.paired import Outcome, check_outcomes, grouped, weighted_mean
from vps.evaluation.templates import render

EARLIER = "vps-ablation-1"
BEGINNING = '{"cell": 0, "seconds": '  # of every line of an earlier version
PACKAGES = ("vps-kernels", "torch", "transformers", "lm-eval", "reasoning-gym")
MOST_DIFFERENCES = 6
FACTS = ("seconds", "first", "facts", "scopes", "error")  # of a record, as it is written
USUAL = {"margin": None, "weight": 1.0}  # of outcomes, which is not written


class RunError(ValueError):
    """Refuse a folder: it holds another run, or none, or another process works on it."""


@dataclass(frozen=True)
class Evaluation:
    """Hold the outcomes of one variant, and the scope that ran by kind of request."""

    outcomes: Sequence[Outcome]
    scopes: Mapping[str, str] = field(default_factory=dict)


Evaluator = Callable[[Cell], Evaluation]


@dataclass(frozen=True)
class AblationResult:
    """Count the cells that this process evaluated, that failed, and that were finished before."""

    evaluated: int
    failed: int
    skipped: int


@dataclass(frozen=True)
class Record:
    """Hold what came of one cell.

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

    @cached_property
    def means(self) -> dict[tuple[str, str], float]:
        """Return the mean of every task and metric."""
        return {
            key: weighted_mean([o.value for o in group], [o.weight for o in group])[0]
            for key, group in grouped(self.outcomes).items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; outcomes are columns, one group a task and metric."""
        groups = []
        for (task, metric), group in grouped(self.outcomes).items():
            names = ("document", "value", *USUAL)
            columns = {name: [getattr(each, name) for each in group] for name in names}
            for name, usual in USUAL.items():
                if set(columns[name]) == {usual}:
                    del columns[name]
            groups.append({"task": task, "metric": metric, **columns})
        facts = {name: getattr(self, name) for name in FACTS}
        return {"cell": self.cell, **facts, "outcomes": groups}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """Make a record of what :meth:`as_dict` gave, here or in an earlier version.

        Raises:
            KeyError, TypeError, ValueError: the values are of something else.
        """
        outcomes: list[Outcome] = []
        for group in values["outcomes"]:
            count = len(group["document"])
            unusual = (group.get(name) or [usual] * count for name, usual in USUAL.items())
            columns = (group["document"], group["value"], *unusual)
            outcomes += [
                Outcome(group["task"], document, group["metric"], *numbers)
                for document, *numbers in zip(*columns, strict=True)
            ]
        return cls(values["cell"], tuple(outcomes), *(values[name] for name in FACTS))


@dataclass(frozen=True)
class Run:
    """Hold what a folder does: the grid, the definition, and records by the cell's index."""

    title: str
    cells: tuple[Cell, ...]
    definition: Mapping[str, Any]
    records: Mapping[int, Record]

    @cached_property
    def finished(self) -> dict[int, Record]:
        """Return the records of cells that did not fail."""
        return {index: record for index, record in self.records.items() if record.error is None}

    @cached_property
    def waiting(self) -> dict[str, list[str]]:
        """Return the finished cells that must not be shown yet, with the controls they wait for."""
        missing: dict[str, list[str]] = {}
        for cell in self.cells:
            if cell.control is not None and cell.index not in self.finished:
                for name in cell.of:
                    missing.setdefault(name, []).append(cell.name)
        done = [cell.name for cell in self.cells if cell.index in self.finished]
        return {name: missing[name] for name in done if name in missing}


def ablate(
    grid: Grid,
    evaluate: Evaluator,
    folder: Path,
    settings: Mapping[str, Any],
    *,
    rank: int = 0,
    world: int = 1,
    facts: Mapping[str, Any] | None = None,
    advance: Callable[[], None] | None = None,
) -> AblationResult:
    """Evaluate the cells of this process that ``folder`` does not hold.

    Killed at any moment and called again, it loses no finished cell and repeats none. A cell that
    fails is written with its error and tried again by the next call; a failed baseline ends the
    run, since nothing can be compared with it.

    Args:
        grid: of :func:`vps.evaluation.grid.read_grid`.
        evaluate: gives the outcomes of a cell, the same documents for each.
        folder: made if it is not there, continued if it is.
        settings: whatever else the numbers depend on, for JSON: model, tasks, limit, seed. A folder
            made with others is refused.
        rank, world: this process takes the cells ``rank``, ``rank + world``, …
        facts: machine and versions, written to each cell.
        advance: called after every cell of this process, finished ones too.

    Raises:
        RunError: the folder holds another run, or another process works on it.
        OSError: the folder cannot be written, such as for a full disk; what was finished stays.
        RuntimeError: the baseline failed.
        ValueError: a rank that does not fit.
    """
    if not 0 <= rank < world:
        raise ValueError(f"ablate: rank is {rank} of {world} processes, expected 0 to {world - 1}")
    say = advance or (lambda: None)
    evaluated = failed = skipped = 0
    with writing(folder, definition_of(grid, settings), rank, world):
        run = _show(folder)
        done = run.finished
        for index in own_cells(len(grid.cells), rank, world):
            if index in done:
                skipped += 1
            else:
                first = evaluated + failed == 0
                record = _evaluated(grid.cells[index], evaluate, first, facts or {})
                path = folder / f"cells/{index}.json"
                files.replace(path, json.dumps(record.as_dict()) + "\n")
                run = _show(folder, run)
                failed += record.error is not None
                evaluated += record.error is None
                if record.error is not None and grid.cells[index].name == BASELINE:
                    raise RuntimeError(f"the baseline failed: {record.error}")
            say()
    return AblationResult(evaluated, failed, skipped)


def _evaluated(cell: Cell, evaluate: Evaluator, first: bool, facts: Mapping[str, Any]) -> Record:
    start = time.perf_counter()
    error = None
    found = Evaluation(())
    try:
        found = evaluate(cell)
        check_outcomes(found.outcomes)
    except Exception as problem:  # whatever a cell brings up must not end the others
        found = Evaluation(())
        error = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
    seconds = round(time.perf_counter() - start, 3)
    return Record(
        cell.index, tuple(found.outcomes), seconds, first, facts, dict(found.scopes), error
    )


def machine_facts(device: str = "cpu") -> dict[str, Any]:
    """Return machine and versions, as they are written to each cell."""
    import torch

    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else processor_name()
    return {
        "device": f"{kind}: {name}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: package_version(package) for package in PACKAGES},
    }


def fingerprint(model: str) -> str | None:
    """Tell weights of a local file or folder apart by names, sizes and last MiB; else ``None``."""
    path = Path(model).expanduser()
    if not path.exists():
        return None
    parts = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    digest = hashlib.sha256()
    for each in parts:
        with each.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**20))
            digest.update(f"{each.name}:{size}:".encode() + file.read())
    return digest.hexdigest()[:16]


def read_run(folder: Path, before: Run | None = None) -> Run:
    """Read the run of a folder, finished or not; nothing is changed.

    Args:
        folder: of :func:`ablate`.
        before: what was read of it earlier, whose finished cells are not read again.

    Raises:
        RunError: no run there, or files that are not of one.
        OSError: a file cannot be read.
    """
    path = folder / "run.json"
    if before is None:
        if not path.exists():
            raise RunError(f"{folder} holds no run: expected {path}, which `vps ablate` makes")
        definition = _definition(path)
        cells = tuple(Cell.from_dict(values) for values in definition["cells"])
        before = Run(definition["title"], cells, definition["settings"], {})
    records = dict(before.records)
    for where, values in _results(folder, before.finished):
        try:
            record = Record.from_dict(values)
        except (KeyError, TypeError, ValueError):
            raise RunError(f"{where} is no result of a cell") from None
        if record.cell not in range(len(before.cells)):
            raise RunError(f"{where} is of no cell of {path}")
        kept = records.get(record.cell)
        if kept is None or kept.error is not None:
            records[record.cell] = record
    return dataclasses.replace(before, records=dict(sorted(records.items())))


def _definition(path: Path) -> dict[str, Any]:
    found = files.parse_object(path.read_bytes())
    keys = {"title", "settings", "cells"}
    if found is None or found.get("format") not in (FORMAT, EARLIER) or not keys <= set(found):
        raise RunError(f"{path} is not of the format {FORMAT} or {EARLIER}")
    return found


def _results(folder: Path, known: Collection[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every result of a cell with its place; those of an earlier version come first."""
    names = {str(index) for index in known}
    for shard in [] if known else sorted(folder.glob("cells-*.jsonl")):
        try:
            rows, _ = files.read_objects(shard, BEGINNING)
        except files.BrokenLineError as error:
            raise RunError(str(error)) from None
        for number, values in enumerate(rows, 1):
            yield f"{shard}: row {number}", values
    for path in sorted(path for path in folder.glob("cells/*.json") if path.stem not in names):
        found = files.parse_object(path.read_bytes()) or {}
        yield str(path), found if path.stem == str(found.get("cell")) else {}


def own_cells(count: int, rank: int, world: int) -> range:
    """Return the indices of the cells that the process of a rank takes: every ``world``-th."""
    return range(rank, count, world)


@contextlib.contextmanager
def writing(
    folder: Path, definition: Mapping[str, Any], rank: int = 0, world: int = 1
) -> Iterator[None]:
    """Hold the cells of a rank, in a folder that is of this run.

    Raises:
        RunError: another process works on one of these cells, or the folder holds another run, with
            what differs.
        OSError: the folder cannot be written.
    """
    count = len(definition["cells"])
    own = own_cells(count, rank, world)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with FileLock(folder / "lock"):
            for other in _working(folder):
                both = set(own) & set(own_cells(count, *other))
                if both:
                    raise RunError(
                        f"another process is writing to {folder} (it works on cell {min(both)}); "
                        "wait for its end, or choose another folder"
                    )
            _check(folder, definition)
            (folder / "cells").mkdir(exist_ok=True)
            lock = FileLock(folder / f"lock-{rank}-of-{world}")  # released by its end of any kind
            held.enter_context(lock.acquire(blocking=False))
        for part in folder.glob("cells/.*.json.*"):  # left by a process that was killed
            if part.name.split(".")[1] in map(str, own):
                part.unlink()
        yield


def wait_for_others(folder: Path) -> None:
    """Return once no process works on a cell of the folder; this one must hold none."""
    while True:
        with FileLock(folder / "lock"):
            if not any(_working(folder)):
                return
        time.sleep(0.1)


def _working(folder: Path) -> Iterator[tuple[int, int]]:
    """Yield rank and world of every process that works on the folder."""
    for path in folder.glob("lock-*-of-*"):
        named = re.fullmatch(r"lock-(\d+)-of-(\d+)", path.name)
        if named is not None:
            try:
                FileLock(path).acquire(blocking=False).lock.release()
            except Timeout:
                yield int(named[1]), int(named[2])


def _check(folder: Path, definition: Mapping[str, Any]) -> None:
    """Make ``run.json``, or compare with the one that is there."""
    path = folder / "run.json"
    if path.exists():
        found = differences(_definition(path), definition)
        if found:
            shown = "; ".join(found[:MOST_DIFFERENCES])
            more = len(found) - MOST_DIFFERENCES
            raise RunError(
                f"{folder} holds another run: {shown}{f'; and {more} more' if more > 0 else ''}. "
                "Choose another folder, or take the change back"
            )
        return
    if any(True for pattern in ("cells-*.jsonl", "cells/*.json") for _ in folder.glob(pattern)):
        raise RunError(f"{folder} holds cells but no run.json")
    if (folder / "table.md").exists():
        raise RunError(f"{folder} holds table.md, but no run.json that it would be of")
    files.replace(path, json.dumps(definition) + "\n")


def _show(folder: Path, before: Run | None = None) -> Run:
    """Write ``table.md``, for whoever looks in before the end or after an interrupt."""
    run = read_run(folder, before)
    columns = list(dict.fromkeys(key for each in run.finished.values() for key in each.means))
    files.replace(folder / "table.md", render("table.md", run=run, columns=columns))
    return run
