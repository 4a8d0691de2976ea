"""``vps eval``: tasks of lm-evaluation-harness on a model, sharpened, plain, and by controls."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from vps import __version__, files
from vps.cli.options import (
    CalibrationOptions,
    Json,
    Process,
    Seed,
    Sharpening,
    TaskOptions,
    count,
    joined,
    own_device,
    take_process,
)
from vps.cli.terminal import Progress, muted
from vps.cli.values import UsageError, blaming

if TYPE_CHECKING:
    from vps.config import VPSConfig
    from vps.model.calibration import Calibration

OUTCOMES, SCORES = "outcomes.jsonl", "scores.json"


@dataclass(kw_only=True)
class Eval(CalibrationOptions, TaskOptions):
    """Run tasks of lm-evaluation-harness, sharpened and plain.

    The plain model, the sharpened one and three controls run on the same documents.

    Tasks that need no download: vps_arithmetic, vps_chains, vps_word_problems, vps_units, each also
    with _choice at its end.

    Several processes share the documents, each with the whole model on a device of its own
    (--device cuda is one GPU for each process; without --multi_gpu accelerate starts only one where
    there is no GPU):

    \b
      accelerate launch --multi_gpu --num_processes 2 -m vps.cli eval ...
      torchrun --nproc-per-node 2 -m vps.cli eval ...
    """

    scoring_scope: Annotated[
        Literal["token", "prompt", "sequence", "batch", "config"],
        Option(help="for scoring given continuations; only token and prompt do not look ahead"),
    ] = "token"
    no_controls: Annotated[
        bool, Option("--no-controls", help="only the plain and the sharpened model")
    ] = False
    seed: Seed = 0
    keep: Annotated[
        int | None,
        count(
            help="also compare on the N documents with the smallest margin of the baseline, as the "
            "paper does, and say what changes of random sign would show there"
        ),
    ] = None
    keep_by: Annotated[
        Literal["uncertain", "hardest"],
        Option(help="margin closest to 0, or lowest margin: wrong answers first"),
    ] = "uncertain"
    out: Annotated[Path | None, Option(help=f"folder for {OUTCOMES} and {SCORES}")] = None
    as_json: Json = False

    def run(self) -> None:
        """Evaluate, print and write."""
        sharpening = self.sharpening()
        tasks = self.task_names()
        self.check_model()
        self._claim()
        process = take_process(os.environ)
        with joined(process) as group:
            scores = self._scores(sharpening, tasks, process, group)
        if process.rank == 0:  # which got the answers of all
            self._report(sharpening.config, tasks, scores)

    def _claim(self) -> None:
        """Make the folder of results, which must not hold others."""
        if self.out is None:
            return
        for name in (OUTCOMES, SCORES):
            if (self.out / name).exists():
                raise UsageError(
                    f"--out {self.out}: holds {name} of another run; give another folder"
                )
        with blaming("--out", self.out):
            self.out.mkdir(parents=True, exist_ok=True)

    def _scores(
        self, sharpening: Sharpening, tasks: list[str], process: Process, group: Any
    ) -> dict[str, Any]:
        """Return what came of every variant, by its name."""
        from vps.evaluation.harness import VARIANTS, Harness

        names = ["baseline", *(name for name in VARIANTS if name != "baseline")]
        if self.no_controls:
            names = names[:2]
        scores: dict[str, Any] = {}
        with Progress(process.rank == 0) as progress, muted(self.debug):
            model, tokenizer = self.load(progress, own_device(self.device, process))
            sharpening.patch(model)
            progress.step("loading the tasks")
            options = self.of_harness() | {"scoring_scope": self.scoring_scope, "group": group}
            harness = Harness(model, tokenizer, tasks, **options)
            _check_apart(harness, sharpening.calibration)
            for number, name in enumerate(names, 1):
                progress.step(f"{name.replace('_', ' ')}, {number} of {len(names)}")
                scores[name] = harness.run(variant=name, seed=self.seed)
                if number == 1:
                    self._check_keep(scores[name])
        return scores

    def _check_keep(self, baseline: Any) -> None:
        """Refuse, before anything else runs, to keep more documents than there are."""
        if self.keep is None:
            return
        pools = _pools(baseline)
        if not pools:
            raise UsageError(
                f"--keep {self.keep}: no task is multiple choice with metric acc, as "
                "vps_chains_choice is"
            )
        for task, pool in pools.items():
            if self.keep > len(pool):
                raise UsageError(f"--keep {self.keep}: {task} has only {len(pool)} documents")

    def _report(self, config: "VPSConfig", tasks: list[str], scores: dict[str, Any]) -> None:
        """Print and write."""
        from vps.evaluation.comparison import table_rows, table_text

        filtered = self._filtered(scores)
        rows = table_rows({name: each.outcomes for name, each in scores.items()})
        values = {
            "vps": __version__,
            "model": self.model,
            "dtype": self.dtype,
            "config": json.loads(config.to_json()),
            "tasks": tasks,
            **{name: getattr(self, name) for name in ("limit", "num_fewshot", "chat", "seed")},
            "variants": {
                name: {
                    field: getattr(each, field)
                    for field in ("scopes", "batch_sizes", "seconds", "results")
                }
                for name, each in scores.items()
            },
            "rows": rows,
            "kept": {
                task: {name: found.as_dict() for name, found in each.items()}
                for task, each in filtered.items()
            },
        }
        if self.calibration is not None:
            values["calibration"] = str(self.calibration)
        if self.out is not None:
            lines = [
                json.dumps({"variant": name, **dataclasses.asdict(outcome)}, ensure_ascii=False)
                for name, each in scores.items()
                for outcome in each.outcomes
            ]
            files.replace(self.out / OUTCOMES, "".join(line + "\n" for line in lines))
            text = json.dumps(values, indent=2, ensure_ascii=False)
            files.replace(self.out / SCORES, text + "\n")
        if self.as_json:
            print(json.dumps(values, ensure_ascii=False))
            return
        print(table_text(rows, [each.scopes for each in scores.values()]))
        for task, each in filtered.items():
            for name, found in each.items():
                print(f"\n{task}, {name} against the baseline:\n{found}")
        if self.out is not None:
            print(f"\nper document: {self.out / OUTCOMES}")

    def _filtered(self, scores: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Make the paper's comparison for every task that has margins and every variant."""
        if self.keep is None:
            return {}
        from vps.evaluation.confidence import confidence_filtered

        pools = {name: _pools(each) for name, each in scores.items()}
        return {
            task: {
                name: confidence_filtered(plain, pools[name][task], self.keep, order=self.keep_by)
                for name in scores
                if name != "baseline"
            }
            for task, plain in pools["baseline"].items()
        }


def _pools(scores: Any) -> dict[str, list[Any]]:
    """Collect the outcomes that have a margin, by task."""
    pools: dict[str, list[Any]] = {}
    for outcome in scores.outcomes:
        if outcome.metric == "acc" and outcome.margin is not None:
            pools.setdefault(outcome.task, []).append(outcome)
    return pools


def _check_apart(harness: Any, calibration: "Calibration | None") -> None:
    """Refuse a document that the calibration was fitted or stopped by."""
    if calibration is None:
        return
    from vps.fitting import Example

    used = set(calibration.examples)
    for task, forms in harness.documents():
        if any(Example(prompt, answer).identity in used for prompt, answer in forms):
            raise UsageError(
                f"--calibration: {task} has a document that it was fitted or stopped by: "
                f"{forms[0][0][:60]!r}"
            )
