"""``vps ablate``: every cell of a grid on tasks, into a folder that can be continued.

``vps report``: tables, pictures and one page of what it found.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from vps import __version__
from vps.cli.options import (
    Command,
    Json,
    Process,
    TaskOptions,
    count,
    own_device,
    take_process,
)
from vps.cli.terminal import Progress, muted
from vps.cli.values import UsageError, blaming

if TYPE_CHECKING:
    from vps.evaluation.grid import Grid
    from vps.evaluation.runs import AblationResult, Evaluator


@dataclass(kw_only=True)
class Ablate(TaskOptions):
    """Evaluate a grid of settings with baseline and controls.

    A grid file, in YAML or JSON:

    \b
      fixed: {builder: sk, scope: token}   fields of VPSConfig for every cell
      grid:                                every combination; a list of such
        - gamma: [0.3, 0.5, 0.7]           mappings, all done
        - rank: [1, 2, 4]
          order: [1, 2]
      cells:                               single cells
        - {name: no clip, tau: null}
      controls: true                       or false, or a list of
                                           random_indices, random_noise,
                                           shuffled_selection
      draws: 1                             of every control

    The unpatched model is always among the cells, and the controls of every cell unless the file
    says otherwise. Given continuations are scored under the cell's scope, which is token unless the
    file sets it.

    Started again, an interrupted run continues. Several processes share the cells
    (without --multi_gpu accelerate starts only one where there is no GPU):

    \b
      accelerate launch --multi_gpu --num_processes 2 -m vps.cli \\
        ablate grid.yaml ...
      torchrun --nproc-per-node 2 -m vps.cli ablate grid.yaml ...
    """

    grid: Annotated[Path, Argument(help="YAML or JSON file of the cells")]
    out: Annotated[Path, Option(help="folder; continued if there")]
    batch_size: Annotated[int, count(metavar="B", help="documents at once")] = 1
    as_json: Json = False

    def run(self) -> None:
        """Evaluate what is missing and say what was done."""
        from vps.evaluation import runs
        from vps.evaluation.grid import GridError, read_grid

        process = take_process(os.environ)
        tasks = self.task_names()
        try:
            grid = read_grid(self.grid)
        except GridError as error:
            raise UsageError(str(error)) from error
        except OSError as error:
            raise UsageError(f"{self.grid}: {error.strerror or error}") from error
        self.check_model()
        settings = {
            "version": __version__,
            "model": self.model,
            "weights": runs.fingerprint(self.model),
            "dtype": self.dtype,
            "tasks": tasks,
            **self.of_harness(),
            "include_path": [str(path) for path in self.include_path],
        }
        with blaming("--out", kinds=(runs.RunError, OSError)):
            definition = runs.definition_of(grid, settings)
            with runs.writing(self.out, definition, process.rank, process.world):
                done = runs.read_run(self.out).finished
        own = runs.own_cells(len(grid.cells), process.rank, process.world)
        try:
            with Progress() as progress, blaming("--out", kinds=(runs.RunError,)):
                evaluate: Evaluator = _nothing
                if any(index not in done for index in own):
                    evaluate = self._evaluator(tasks, grid, process, progress)
                progress.step("evaluating", len(own))
                with muted(self.debug):
                    result = runs.ablate(
                        grid,
                        evaluate,
                        self.out,
                        settings,
                        rank=process.rank,
                        world=process.world,
                        facts=runs.machine_facts(own_device(self.device, process)),
                        advance=progress.advance,
                    )
        except KeyboardInterrupt:
            print(f"vps: {self.out}/table.md holds what is finished; the same command goes on",
                  file=sys.stderr)  # fmt: skip
            raise
        self._say(process, len(own), result)
        if result.failed:
            if process.world > 1:  # a launcher ends the other processes with the first that fails
                runs.wait_for_others(self.out)
            failed = f"{result.failed} of {len(own)} cells failed"
            raise RuntimeError(f"{failed}; see {self.out}/table.md")

    def _evaluator(
        self, tasks: list[str], grid: "Grid", process: Process, progress: Progress
    ) -> "Evaluator":
        from vps.evaluation.harness import Harness, evaluator

        with muted(self.debug):
            model, tokenizer = self.load(progress, own_device(self.device, process))
            _patch(model, grid)
            progress.step("loading the tasks")
            with blaming("--tasks", kinds=(ValueError,)):
                options = self.of_harness() | {"scoring_scope": "config"}
                return evaluator(Harness(model, tokenizer, tasks, **options))

    def _say(self, process: Process, cells: int, result: "AblationResult") -> None:
        counts = {
            "evaluated": result.evaluated,
            "failed": result.failed,
            "finished before": result.skipped,
        }
        if self.as_json:
            facts = {"rank": process.rank, "world": process.world, "out": str(self.out)}
            print(json.dumps({"cells": cells, **counts, **facts}))
            return
        of = f" of process {process.rank + 1} of {process.world}" if process.world > 1 else ""
        told = ", ".join(f"{number} {name}" for name, number in counts.items())
        print(f"{cells} cells{of}: {told}")
        if process.rank == 0:
            print(f"report: vps report {self.out}")


def _patch(model: Any, grid: "Grid") -> None:
    """Sharpen the model for the first cell that fits it; the others patch for their time."""
    from vps.model.patching import patch

    problem: ValueError | None = None
    for cell in grid.cells:
        if cell.config is not None:
            try:
                patch(model, cell.config)
                return
            except ValueError as error:
                problem = problem or error
    raise UsageError(f"no cell of the grid fits the model: {problem}")


def _nothing(cell: Any) -> Any:
    raise RuntimeError(f"cell {cell.name!r} was finished when the run began, and now is not")


@dataclass(kw_only=True)
class Report(Command):
    """Show what an ablation found, in tables, pictures and one page.

    Compares the finished cells of a run, which may still be going on, and writes Markdown, CSV, PNG
    and one HTML page. A cell is shown with its controls or not at all.
    """

    folder: Annotated[Path, Argument(help="--out of vps ablate")]
    out: Annotated[Path | None, Option(help="folder of the report (default: the run's)")] = None
    without_controls: Annotated[
        bool,
        Option("--without-controls", help="show cells whose controls are not finished too"),
    ] = False
    as_json: Json = False

    def run(self) -> None:
        """Write the report and print its findings."""
        from vps.evaluation.report import FILES, write_report
        from vps.evaluation.runs import RunError
        from vps.evaluation.summary import summarise

        with Progress() as progress:
            progress.step("comparing")
            try:
                analysis = write_report(
                    self.folder, self.out, without_controls=self.without_controls
                )
            except RunError as error:
                raise UsageError(str(error)) from error
        words = summarise(analysis)
        files = [str((self.out or self.folder) / name) for name in FILES]
        if self.as_json:
            values = {
                "findings": words.findings,
                "missing": words.missing,
                "methods": words.methods,
                "conditions": dict(words.conditions),
                "files": files,
            }
            print(json.dumps(values, ensure_ascii=False))
        else:
            print(*words.findings, *words.missing, f"report: {files[-1]}", sep="\n")
