"""``vps report``: tables, pictures and one page of what an ablation found."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vps.cli.options import UsageError
from vps.cli.terminal import Progress


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "report",
        parents=[common],
        help="what an ablation found: Markdown, CSV, PNG and one HTML page",
        description="Compares the finished cells of a run, which may still be going on. A cell is "
        "shown with its controls or not at all.",
    )
    parser.add_argument("folder", type=Path, help="--out of vps ablate")
    parser.add_argument("--out", type=Path, help="folder of the report (default: the run's)")
    parser.add_argument(
        "--without-controls",
        action="store_true",
        help="show cells whose controls are not finished too",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the report and print its findings."""
    from vps.evaluation.report import FILES, write_report
    from vps.evaluation.runs import RunError
    from vps.evaluation.summary import summarise

    progress = Progress()
    progress.step("comparing")
    try:
        analysis = write_report(
            arguments.folder, arguments.out, without_controls=arguments.without_controls
        )
    except RunError as error:
        raise UsageError(str(error)) from error
    finally:
        progress.close()
    words = summarise(analysis)
    files = [str((arguments.out or arguments.folder) / name) for name in FILES]
    if arguments.json:
        print(
            json.dumps(
                {
                    "findings": words.findings,
                    "missing": words.missing,
                    "methods": words.methods,
                    "conditions": dict(words.conditions),
                    "files": files,
                },
                ensure_ascii=False,
            )
        )
        return
    print(*words.findings, *words.missing, f"report: {files[-1]}", sep="\n")
