"""``vps demo``: three prompts on SmolLM2-135M, plain and sharpened, and one refinement."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vps.cli.options import UsageError, positive
from vps.cli.refine import report as told_iterations
from vps.cli.terminal import Progress, difference_line, muted, quiet_transformers, side_by_side


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "demo",
        parents=[common],
        help="three prompts on SmolLM2-135M, plain and sharpened, one refinement, ten problems "
        "with a calibration",
    )
    parser.add_argument("--model-dir", type=Path, default=Path(".cache/smollm2"))
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the report")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the demo and print what it found."""
    quiet_transformers(arguments.debug)
    from vps.cli.demo.comparison import run_demo

    progress = Progress()
    try:
        with muted(arguments.debug):
            run = run_demo(
                arguments.model_dir, arguments.out, arguments.max_new_tokens, progress.step
            )
    except FileNotFoundError as error:
        raise UsageError(f"--model-dir: {error}") from error
    finally:
        progress.close()
    for answer in run.answers:
        print(f"\n> {answer.prompt}\n")
        print(side_by_side(answer.plain.text, answer.sharpened.text))
        print(difference_line(answer.first_difference))
    print(f"\n> {run.refined.prompt}\n\nrefined, gold answer {run.refined.gold}:\n")
    print(told_iterations(run.refined.result))
    if run.calibrated is not None:
        print(f"\n{run.calibrated}")
    print(
        f"\nplain {run.plain_rate:.1f} tokens/s, sharpened {run.sharpened_rate:.1f} tokens/s, "
        f"time ratio {run.plain_rate / run.sharpened_rate:.2f}"
    )
    print(f"next-token choices changed: {run.changed:.1%} (scope token, along the plain answers)")
    print(f"report: {run.report}")
