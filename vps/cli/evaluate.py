"""``vps eval``: tasks of lm-evaluation-harness on a model, sharpened, plain, and by controls."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from vps import __version__
from vps.cli.options import (
    UsageError,
    add_calibration,
    add_config,
    add_model,
    apply_calibration,
    load_named_model,
    positive,
    read_calibration,
    usable_device,
)
from vps.cli.processes import Process, joined, own_device, take_process
from vps.cli.terminal import Progress, muted, quiet_transformers

OUTCOMES, SCORES = "outcomes.jsonl", "scores.json"
DESCRIPTION = """Runs the plain model, the sharpened one and three controls on the same documents.

Tasks that need no download: vps_arithmetic, vps_chains, vps_word_problems, vps_units, each also
with _choice at its end.

Several processes share the documents, each with the whole model on a device of its own (--device
cuda is one GPU for each process; without --multi_gpu accelerate starts only one where there is no
GPU):

  accelerate launch --multi_gpu --num_processes 2 -m vps.cli eval ...
  torchrun --nproc-per-node 2 -m vps.cli eval ...
"""


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "eval",
        parents=[common],
        help="run tasks of lm-evaluation-harness, sharpened and plain",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument(
        "--tasks", required=True, metavar="A,B", help="names of tasks or groups, or YAML files"
    )
    parser.add_argument(
        "--include-path", type=Path, action="append", default=[], metavar="DIR",
        help="folder of YAML tasks; may be repeated",
    )  # fmt: skip
    add_config(parser)
    add_calibration(parser)
    parser.add_argument("--limit", type=positive, metavar="N", help="documents of each task")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="B")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before a question")
    parser.add_argument("--chat", action="store_true", help="use the chat template")
    parser.add_argument(
        "--scoring-scope", choices=("token", "sequence", "batch", "config"), default="token",
        help="scope for scoring given continuations (default: token, the only one without leaks)",
    )  # fmt: skip
    parser.add_argument(
        "--no-controls", action="store_true", help="only the plain and the sharpened model"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the controls")
    parser.add_argument(
        "--keep", type=positive, metavar="N",
        help="also compare on the N documents with the smallest margin of the baseline, as the "
        "paper does, with what a change without direction would show there",
    )  # fmt: skip
    parser.add_argument(
        "--keep-by", choices=("uncertain", "hardest"), default="uncertain",
        help="distance of the margin from 0 (default), or the margin: wrong answers first",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help=f"folder for {OUTCOMES} and {SCORES}"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print and write."""
    config, calibration = read_calibration(arguments, arguments.set)
    tasks = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if not tasks:
        raise UsageError(f"--tasks {arguments.tasks!r}: expected names, separated by commas")
    if arguments.num_fewshot is not None and arguments.num_fewshot < 0:
        raise UsageError(f"--num-fewshot {arguments.num_fewshot}: expected at least 0")
    for path in arguments.include_path:
        if not path.is_dir():
            raise UsageError(f"--include-path {path}: no such folder")
    _claim(arguments.out)
    process = take_process(os.environ)
    quiet_transformers(arguments.debug)
    with joined(process) as group:
        scores = _scores(arguments, config, calibration, tasks, process, group)
    if process.rank == 0:  # which got the answers of all
        _report(arguments, config, tasks, scores)


def _scores(
    arguments: argparse.Namespace,
    config: Any,
    calibration: Any,
    tasks: list[str],
    process: Process,
    group: Any,
) -> dict[str, Any]:
    """What came of every variant, by its name."""

    from vps import patch
    from vps.evaluation.harness import VARIANTS, Harness

    device = usable_device(own_device(arguments.device, process))
    names = ["baseline", *(name for name in VARIANTS if name != "baseline")]
    if arguments.no_controls:
        names = names[:2]
    progress = Progress(process.rank == 0)
    scores: dict[str, Any] = {}
    try:
        with muted(arguments.debug):
            progress.step("loading the model")
            model, tokenizer = load_named_model(arguments, device)
            patch(model, config)
            apply_calibration(arguments, model, calibration)
            progress.step("loading the tasks")
            harness = Harness(
                model,
                tokenizer,
                tasks,
                limit=arguments.limit,
                batch_size=arguments.batch_size,
                num_fewshot=arguments.num_fewshot,
                include_path=arguments.include_path,
                chat=arguments.chat,
                scoring_scope=arguments.scoring_scope,
                group=group,
            )
            _check_apart(harness, calibration)
            for number, name in enumerate(names, 1):
                progress.step(f"{name.replace('_', ' ')}, {number} of {len(names)}")
                scores[name] = harness.run(variant=name, seed=arguments.seed)
                if number == 1:
                    _check_keep(scores[name], arguments.keep)
    finally:
        progress.close()
    return scores


def _report(
    arguments: argparse.Namespace, config: Any, tasks: list[str], scores: dict[str, Any]
) -> None:
    """Print and write."""
    from vps.evaluation import harness

    filtered = {} if arguments.keep is None else _filtered(scores, arguments)
    values = {
        "vps": __version__,
        "model": arguments.model,
        "dtype": arguments.dtype,
        "config": json.loads(config.to_json()),
        "tasks": tasks,
        "limit": arguments.limit,
        "num_fewshot": arguments.num_fewshot,
        "chat": arguments.chat,
        "seed": arguments.seed,
        "variants": {
            name: {
                "scopes": each.scopes,
                "batch_sizes": each.batch_sizes,
                "seconds": each.seconds,
                "results": each.results,
            }
            for name, each in scores.items()
        },
        "rows": harness.table_rows(scores),
        "kept": {
            task: {name: found.as_dict() for name, found in each.items()}
            for task, each in filtered.items()
        },
    }
    if arguments.calibration is not None:
        values["calibration"] = str(arguments.calibration)
    if arguments.out is not None:
        lines = [
            json.dumps({"variant": name, **dataclasses.asdict(outcome)}, ensure_ascii=False)
            for name, each in scores.items()
            for outcome in each.outcomes
        ]
        _write(arguments.out / OUTCOMES, "".join(line + "\n" for line in lines))
        _write(arguments.out / SCORES, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    if arguments.json:
        print(json.dumps(values, ensure_ascii=False))
        return
    print(harness.table_text(scores))
    for task, each in filtered.items():
        for name, found in each.items():
            print(f"\n{task}, {name} against the baseline:\n{found}")
    if arguments.out is not None:
        print(f"\nper document: {arguments.out / OUTCOMES}")


def _filtered(scores: dict[str, Any], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The paper's comparison, for every task that has margins and every variant."""
    from vps.evaluation.confidence import confidence_filtered

    pools = {name: _pools(each) for name, each in scores.items()}
    return {
        task: {
            name: confidence_filtered(
                plain, pools[name][task], arguments.keep, order=arguments.keep_by
            )
            for name in scores
            if name != "baseline"
        }
        for task, plain in pools["baseline"].items()
    }


def _pools(scores: Any) -> dict[str, list[Any]]:
    """Outcomes with a margin, by task."""
    pools: dict[str, list[Any]] = {}
    for outcome in scores.outcomes:
        if outcome.metric == "acc" and outcome.margin is not None:
            pools.setdefault(outcome.task, []).append(outcome)
    return pools


def _check_keep(baseline: Any, keep: int | None) -> None:
    """Before anything else runs."""
    if keep is None:
        return
    pools = _pools(baseline)
    if not pools:
        raise UsageError(f"--keep {keep}: no task is multiple choice with metric acc")
    for task, pool in pools.items():
        if keep > len(pool):
            raise UsageError(f"--keep {keep}: {task} has only {len(pool)} documents")


def _check_apart(harness: Any, calibration: Any) -> None:
    """No document may be one that the calibration was fitted or stopped by."""
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


def _claim(out: Path | None) -> None:
    """Make the folder of results, which must not hold others."""
    if out is None:
        return
    for name in (OUTCOMES, SCORES):
        if (out / name).exists():
            raise UsageError(f"--out {out}: holds {name} of another run")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    """The whole file or none."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
