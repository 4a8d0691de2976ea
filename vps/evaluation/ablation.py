"""Evaluate every cell of a grid, each written as soon as it is done."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vps import jsonl
from vps.doctor import package_version, processor_name
from vps.evaluation import runs
from vps.evaluation.grid import BASELINE, Cell, Grid
from vps.evaluation.outcome import Outcome
from vps.evaluation.overview import progress_table
from vps.evaluation.runs import Record

PACKAGES = ("vps-kernels", "torch", "transformers", "lm-eval", "reasoning-gym")


@dataclass(frozen=True)
class Evaluation:
    """What came of one variant: its outcomes, and the scope that ran by kind of request."""

    outcomes: Sequence[Outcome]
    scopes: Mapping[str, str] = field(default_factory=dict)


Evaluator = Callable[[Cell], Evaluation]


@dataclass(frozen=True)
class AblationResult:
    """How many cells this process evaluated, that failed, and that had been finished before."""

    evaluated: int
    failed: int
    skipped: int


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
    """Evaluate the cells that ``folder`` does not hold, those of one process of several.

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
    definition = runs.definition_of(grid, settings)
    with runs.writing(folder, definition, rank, world) as shard:
        done = runs.read_run(folder).finished
        first = True
        _show(folder)
        for index in runs.own_cells(len(grid.cells), rank, world):
            if index in done:
                skipped += 1
            else:
                record = _evaluated(grid.cells[index], evaluate, first, facts or {})
                first = False
                jsonl.append(shard, runs.line_of(record))
                _show(folder)
                failed += record.error is not None
                evaluated += record.error is None
                if record.error is not None and grid.cells[index].name == BASELINE:
                    raise RuntimeError(f"the baseline failed: {record.error}")
            say()
    return AblationResult(evaluated, failed, skipped)


def harness_evaluator(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    num_fewshot: int | None = None,
    include_path: Sequence[Path] = (),
    chat: bool = False,
) -> Evaluator:
    """Evaluation of cells by lm-eval: the one place that knows how the harness is called.

    Given continuations are scored under the scope of the cell, which is causal unless the grid
    asks for another. The arguments are those of :class:`vps.evaluation.harness.Harness`.
    """
    from vps.evaluation.harness import Harness

    harness = Harness(
        model,
        tokenizer,
        tasks,
        limit=limit,
        batch_size=batch_size,
        num_fewshot=num_fewshot,
        include_path=include_path,
        chat=chat,
        scoring_scope="config",
    )

    def evaluate(cell: Cell) -> Evaluation:
        variant = BASELINE if cell.config is None else cell.control or "sharpened"
        scores = harness.run(cell.config, variant, seed=cell.draw)
        return Evaluation(scores.outcomes, scores.scopes)

    return evaluate


def machine_facts(device: str = "cpu") -> dict[str, Any]:
    """Machine and versions, as they are written to each cell."""
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else processor_name()
    return {
        "device": f"{kind}: {name}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: package_version(package) for package in PACKAGES},
    }


def fingerprint(model: str) -> str | None:
    """Tells weights of a local file or folder apart by names, sizes and last MiB; else ``None``."""
    path = Path(model).expanduser()
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    digest = hashlib.sha256()
    for each in files:
        with each.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**20))
            digest.update(f"{each.name}:{size}:".encode() + file.read())
    return digest.hexdigest()[:16]


def _show(folder: Path) -> None:
    """The table of what is finished, for whoever looks in before the end or after an interrupt."""
    jsonl.replace(folder / "table.md", progress_table(runs.read_run(folder)))


def _evaluated(cell: Cell, evaluate: Evaluator, first: bool, facts: Mapping[str, Any]) -> Record:
    start = time.perf_counter()
    error = None
    found = Evaluation(())
    try:
        found = evaluate(cell)
        runs.check_outcomes(found.outcomes)
    except Exception as problem:  # whatever a cell brings up must not end the others
        found = Evaluation(())
        error = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
    seconds = time.perf_counter() - start
    return Record(
        cell.index, tuple(found.outcomes), seconds, first, facts, dict(found.scopes), error
    )
