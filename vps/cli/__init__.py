"""The command ``vps``: parses, calls, prints."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

from vps import __version__
from vps.cli import ablate, calibrate, demo, doctor, evaluate, generate, refine, report
from vps.cli.options import Parser, UsageError, read_config
from vps.cli.terminal import Progress, quiet, standard_streams

__all__ = ["Progress", "UsageError", "main", "read_config"]

EPILOG = """examples:
  vps generate --model HuggingFaceTB/SmolLM2-135M-Instruct --prompt "What is 17 + 25?" --compare
  vps generate --model model.gguf --prompt-file question.txt --set gamma=0.1 --set builder=sk
  vps refine --model model.gguf --prompt "What is 17 + 25?" --gold 42
  vps calibrate --model model.gguf --data train.jsonl --out cal.json
  vps eval --model model.gguf --tasks vps_chains,vps_chains_choice --limit 40
  vps ablate grid.yaml --model model.gguf --tasks arc_easy --limit 200 --out runs/x
  vps report runs/x
  vps doctor
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns 0, 1 for a failure, 2 for bad usage, 130 when interrupted."""
    if sys.stdout is None:
        if sys.stderr is not None:
            print("vps: error: standard output is closed", file=sys.stderr)
        return 2
    with standard_streams():
        return _run(argv)


def _run(argv: list[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    level = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            quiet(arguments.debug)
            arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("vps: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"vps: error: {line}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    finally:
        logging.disable(level)
    return 0


def _parser() -> argparse.ArgumentParser:
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks and library warnings")
    parser = Parser(
        prog="vps",
        description="Sharpen the linear layers of a language model on the fly.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vps {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (generate, refine, calibrate, evaluate, ablate, report, demo, doctor):
        command.add(commands, common)
    return parser
