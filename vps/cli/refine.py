"""``vps refine``: verified refinement of one prompt, or of the rows of a JSONL file."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vps import __version__
from vps.cli.options import (
    UsageError,
    add_answer,
    add_calibration,
    add_config,
    add_model,
    add_prompt,
    apply_calibration,
    load_named_model,
    positive,
    read_calibration,
    read_prompt,
    spoken,
    usable_device,
)
from vps.cli.terminal import Progress, muted, quiet_transformers
from vps.reading import parse_json

if TYPE_CHECKING:
    from vps.refine import RefineResult

LABELLED = "The gold answer was used: accuracy of these answers on the same gold is not accuracy."


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "refine",
        parents=[common],
        help="answer, verify against a gold answer, adapt the sharpening, answer again",
        description="Without a gold answer the plain answer comes back, unless --samples asks to "
        "judge by agreement of sampled answers.",
    )
    add_model(parser)
    source = add_prompt(parser)
    source.add_argument("--data", type=Path, help='JSONL rows {"prompt", "gold"?, "id"?}')
    parser.add_argument("--out", type=Path, help="JSONL of results for --data; continued if there")
    parser.add_argument("--gold", type=spoken, help="the reference answer of --prompt")
    parser.add_argument(
        "--iterations",
        type=positive,
        default=3,
        metavar="N",
        help="answers, counting the plain one",
    )
    parser.add_argument("--keep", choices=("best", "last"), default="best")
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="answers drawn for self-consistency"
    )
    parser.add_argument(
        "--no-surrogate", action="store_true", help="take no gradient from the gold answer"
    )
    parser.add_argument(
        "--weights", metavar="JSON", help='of the loss, e.g. {"numeric": 1, "units": 0.5}'
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples")
    add_config(parser)
    add_calibration(parser)
    add_answer(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Refine and print, or write the rows."""
    config, calibration = read_calibration(arguments, arguments.set)
    options: dict[str, Any] = {
        "iterations": arguments.iterations,
        "keep": arguments.keep,
        "surrogate": not arguments.no_surrogate,
        "samples": arguments.samples,
        "weights": _weights(arguments.weights),
        "max_new_tokens": arguments.max_new_tokens,
        "chat": not arguments.no_chat,
        "seed": arguments.seed,
    }
    if arguments.samples == 1 or arguments.samples < 0:
        raise UsageError(f"--samples {arguments.samples}: expected 0 or at least 2")
    if arguments.data is not None:
        work = _rows(arguments, options, json.loads(config.to_json()), calibration)
    else:
        work = _prompt(arguments, options)
    quiet_transformers(arguments.debug)

    from vps import patch

    device = usable_device(arguments.device)
    progress = Progress()
    try:
        progress.step("loading the model")
        with muted(arguments.debug):
            model, tokenizer = load_named_model(arguments, device)
        patch(model, config)
        apply_calibration(arguments, model, calibration)
        finish = work(model, tokenizer, progress)
    finally:
        progress.close()
    finish()


Work = Callable[[Any, Any, Progress], Callable[[], None]]


def _prompt(arguments: argparse.Namespace, options: dict[str, Any]) -> Work:
    """What to do with the model for one prompt, which returns what to do last."""
    if arguments.out is not None:
        raise UsageError("--out: only with --data")
    prompt = read_prompt(arguments)
    if arguments.gold is not None and not arguments.gold.strip():
        raise UsageError("--gold: expected an answer, got nothing")

    def work(model: Any, tokenizer: Any, progress: Progress) -> Callable[[], None]:
        from vps import refine

        result = refine(model, tokenizer, prompt, arguments.gold, **options, progress=progress.step)
        values = {"model": arguments.model, "prompt": prompt, "gold": arguments.gold}
        if arguments.json:
            text = json.dumps(values | result.as_dict(), ensure_ascii=False)
        else:
            text = report(result)
        return lambda: print(text)

    return work


def _rows(
    arguments: argparse.Namespace, options: dict[str, Any], config: Any, calibration: Any
) -> Work:
    """The same for a file of rows."""
    from vps.cli.batch import ContinuationError, finished_rows, read_rows, refine_rows

    if arguments.out is None:
        raise UsageError("--data: needs --out")
    if arguments.gold is not None:
        raise UsageError("--gold: not with --data, whose rows hold their own")
    settings = {
        "version": __version__,
        "model": arguments.model,
        "dtype": arguments.dtype,
        **options,
        "config": config,
        "calibration": None,
    }
    if calibration is not None:
        text = calibration.to_json().encode()
        settings["calibration"] = hashlib.sha256(text).hexdigest()
    try:
        rows = read_rows(arguments.data)
    except OSError as error:
        raise UsageError(f"--data: {error}") from error
    if not rows:
        raise UsageError(f"--data {arguments.data}: holds no row")
    if all(row.error is not None for row in rows):
        first = f"line {rows[0].number}: {rows[0].error}"
        raise UsageError(f"--data {arguments.data}: no row can be used; {first}")
    if arguments.out.exists() and arguments.out.samefile(arguments.data):
        raise UsageError(f"--out {arguments.out}: is the file of --data; give another")
    try:
        finished_rows(arguments.out, rows, settings)
        arguments.out.open("ab").close()
    except (ContinuationError, OSError) as error:
        raise UsageError(f"--out: {error}") from error

    def work(model: Any, tokenizer: Any, progress: Progress) -> Callable[[], None]:
        progress.step("refining", len(rows))
        done = refine_rows(
            model, tokenizer, rows, arguments.out,
            settings=settings, options=options, advance=progress.advance,
        )  # fmt: skip

        def finish() -> None:
            counts = {"refined": done.refined, "failed": done.failed, "skipped": done.skipped}
            labelled = any(row.gold is not None for row in rows) and arguments.iterations > 1
            if arguments.json:
                print(json.dumps(counts | {"used_labels": labelled, "out": str(arguments.out)}))
            else:
                print(", ".join(f"{number} {name}" for name, number in counts.items()))
                if labelled:
                    print(LABELLED)
            if done.failed:
                raise RuntimeError(f"{done.failed} of {len(rows)} rows failed; see {arguments.out}")

        return finish

    return work


def _weights(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    from vps.verify.composite import check_weights

    try:
        return check_weights(parse_json(text))
    except (ValueError, TypeError) as error:
        raise UsageError(f"--weights {text}: {error}") from error


def report(result: RefineResult) -> str:
    """Every iteration with its losses, then the answer and whether labels were used."""
    lines = []
    for entry in result.iterations:
        parts = [f"iteration {entry.index}"]
        if entry.index == 0:
            parts.append("plain")
        else:
            parts.append(
                f"{entry.builder}, ℋ {entry.entropy:.2f} nats, σ {entry.sigma:.2f}, "
                f"γ {entry.gamma:.2f}, rank {entry.rank:.1f}, {entry.pairs:.1f} L-BFGS pairs"
            )
        if entry.losses is not None:
            each = ", ".join(f"{name} {loss:.4g}" for name, loss in entry.losses.parts.items())
            parts.append(f"loss {entry.losses.total:.4g} ({each})")
        lines += [": ".join(parts), f"  {' '.join(entry.text.split())}"]
    lines += ["", f"answer, of iteration {result.chosen} ({result.keep}):", result.answer]
    lines.append(LABELLED if result.used_labels else "No gold answer was used.")
    return "\n".join(lines)
