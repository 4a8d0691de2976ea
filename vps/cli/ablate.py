"""``vps ablate``: every cell of a grid on tasks, into a folder that can be continued."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vps import __version__
from vps.cli.options import (
    UsageError,
    add_model,
    load_named_model,
    positive,
    usable_device,
)
from vps.cli.processes import Process, own_device, take_process
from vps.cli.terminal import Progress, muted, quiet_transformers

if TYPE_CHECKING:
    from vps.evaluation.grid import Grid
    from vps.evaluation.runs import AblationResult, Evaluator

DESCRIPTION = """A grid file, in YAML or JSON:

  fixed: {builder: sk, scope: token}       fields of VPSConfig for every cell
  grid:                                    every combination; a list of such mappings, all done
    - gamma: [0.3, 0.5, 0.7]
    - rank: [1, 2, 4]
      order: [1, 2]
  cells:                                   single cells
    - {name: no clip, tau: null}
  controls: true                           or false, or a list of random_indices, random_noise,
                                           shuffled_selection
  draws: 1                                 of every control

The unpatched model is always among the cells, and the controls of every cell unless the file says
otherwise. Given continuations are scored under the cell's scope, which is token unless the file
sets it.

Killed or interrupted, the same command goes on where it was. Several processes share the cells
(without --multi_gpu accelerate starts only one where there is no GPU):

  accelerate launch --multi_gpu --num_processes 2 -m vps.cli ablate grid.yaml ...
  torchrun --nproc-per-node 2 -m vps.cli ablate grid.yaml ...
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "ablate",
        parents=[common],
        help="evaluate a grid of settings with baseline and controls",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("grid", type=Path, help="YAML or JSON file of the cells")
    add_model(parser)
    parser.add_argument(
        "--tasks", required=True, type=_names, metavar="A,B", help="names or YAML files of tasks"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder; continued if there")
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="documents of each task (default: all)"
    )
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="default: the task's own")
    parser.add_argument(
        "--include-path", type=Path, action="append", default=[], help="folder of YAML tasks"
    )
    parser.add_argument("--chat", action="store_true", help="use the tokenizer's chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate what is missing and say what was done."""
    from vps.evaluation import runs
    from vps.evaluation.grid import GridError, read_grid

    process = take_process(os.environ)
    try:
        grid = read_grid(arguments.grid)
    except (GridError, OSError) as error:
        raise UsageError(str(error)) from error
    quiet_transformers(arguments.debug)
    settings = {
        "version": __version__,
        "model": arguments.model,
        "weights": runs.fingerprint(arguments.model),
        "dtype": arguments.dtype,
        "tasks": arguments.tasks,
        "limit": arguments.limit,
        "batch_size": arguments.batch_size,
        "num_fewshot": arguments.num_fewshot,
        "include_path": [str(path) for path in arguments.include_path],
        "chat": arguments.chat,
    }
    try:
        with runs.writing(
            arguments.out, runs.definition_of(grid, settings), process.rank, process.world
        ):
            done = runs.read_run(arguments.out).finished
    except (runs.RunError, OSError) as error:
        raise UsageError(f"--out: {error}") from error
    own = runs.own_cells(len(grid.cells), process.rank, process.world)
    progress = Progress()
    try:
        evaluate = None
        if any(index not in done for index in own):
            evaluate = _evaluator(arguments, grid, process, progress)
        progress.step("evaluating", len(own))
        with muted(arguments.debug):
            result = runs.ablate(
                grid,
                evaluate or _nothing,
                arguments.out,
                settings,
                rank=process.rank,
                world=process.world,
                facts=runs.machine_facts(own_device(arguments.device, process)),
                advance=progress.advance,
            )
    except runs.RunError as error:
        raise UsageError(f"--out: {error}") from error
    except KeyboardInterrupt:
        progress.close()
        print(f"vps: {arguments.out}/table.md holds what is finished; the same command goes on",
              file=sys.stderr)  # fmt: skip
        raise
    finally:
        progress.close()
    _say(arguments, process, len(own), result)
    if result.failed:
        if process.world > 1:  # a launcher ends the other processes with the first that fails
            runs.wait_for_others(arguments.out)
        raise RuntimeError(
            f"{result.failed} of {len(own)} cells failed; see {arguments.out}/table.md"
        )


def _evaluator(
    arguments: argparse.Namespace, grid: Grid, process: Process, progress: Progress
) -> Evaluator:

    from vps.evaluation.harness import harness_evaluator

    device = usable_device(own_device(arguments.device, process))
    progress.step("loading the model")
    with muted(arguments.debug):
        model, tokenizer = load_named_model(arguments, device)
        _patch(model, grid)
        progress.step("loading the tasks")
        try:
            return harness_evaluator(
                model,
                tokenizer,
                arguments.tasks,
                limit=arguments.limit,
                batch_size=arguments.batch_size,
                num_fewshot=arguments.num_fewshot,
                include_path=arguments.include_path,
                chat=arguments.chat,
            )
        except ValueError as error:
            raise UsageError(f"--tasks: {error}") from error


def _patch(model: Any, grid: Grid) -> None:
    """Sharpen the model for the first cell that fits it; the others patch for their time."""
    from vps import patch

    problem: ValueError | None = None
    for cell in grid.cells:
        if cell.config is not None:
            try:
                patch(model, cell.config)
                return
            except ValueError as error:
                problem = problem or error
    raise UsageError(f"no cell of the grid fits the model: {problem}")


def _say(
    arguments: argparse.Namespace, process: Process, cells: int, result: AblationResult
) -> None:
    counts = {
        "evaluated": result.evaluated,
        "failed": result.failed,
        "finished before": result.skipped,
    }
    if arguments.json:
        facts = {"rank": process.rank, "world": process.world, "out": str(arguments.out)}
        print(json.dumps({"cells": cells, **counts, **facts}))
        return
    of = f" of process {process.rank + 1} of {process.world}" if process.world > 1 else ""
    print(f"{cells} cells{of}: {', '.join(f'{number} {name}' for name, number in counts.items())}")
    if process.rank == 0:
        print(f"report: vps report {arguments.out}")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no task")
    return names


def _nothing(cell: Any) -> Any:
    raise RuntimeError(f"cell {cell.name!r} was finished when the run began, and now is not")
