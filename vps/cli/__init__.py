"""Run the command ``vps``: parse, call, print.

====================  ============================================================
``__init__``          the commands, their errors and exit codes
``terminal``          progress, two columns, streams of every kind
``values``            reads single values; one line where one cannot be used
``options``           options that several commands share; the process among others
``generate``          text, sharpened and plain
``refine``            answers that are verified against a gold answer; JSONL rows
``calibrate``         a fitted γ for every layer
``evaluate``          ``vps eval``: tasks of lm-evaluation-harness
``ablate``            a grid of settings, and its report
``doctor``            what this machine can run
``demo``              all of it on SmolLM2-135M
``__main__``          ``python -m vps.cli``
====================  ============================================================
"""

import gc
import io
import logging
import os
import sys
import warnings
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated

from vps import __version__
from vps.cli.terminal import quiet, standard_streams
from vps.doctor import how_to_install

if TYPE_CHECKING:
    from vps.cli.options import Command

__all__ = ["main"]

EPILOG = """\b
Examples:
  vps generate --model HuggingFaceTB/SmolLM2-135M-Instruct \\
    --prompt "Why is the sky blue?" --compare
  vps generate --model model.gguf --prompt-file question.txt \\
    --set gamma=0.1 --set builder=sk
  vps refine --model model.gguf --prompt "What is 17 + 25?" --gold 42
  vps calibrate --model model.gguf --data train.jsonl --out cal.json
  vps eval --model model.gguf --tasks vps_chains,vps_chains_choice --limit 40
  vps ablate grid.yaml --model model.gguf --tasks arc_easy --out runs/x
  vps report runs/x
  vps doctor

\b
Environment:
  VPS_BACKEND  who computes a layer: torch, cpp, triton, cuda or reference
  VPS_CACHE    folder of dequantized .gguf weights, 4 bytes a parameter
               (default: ~/.cache/vps), or off to keep none
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return 0, 1 for a failure, 2 for bad usage, 130 when interrupted."""
    if sys.stdout is None:
        if sys.stderr is not None:
            print("vps: error: standard output is closed", file=sys.stderr)
        return 2
    with standard_streams():
        return _run(argv)


def _run(argv: list[str] | None) -> int:
    debug = False
    level = logging.root.manager.disable
    collects = gc.isenabled()
    gc.disable()  # a sixth of the time until a model is loaded, which enables it again
    try:
        command = _parse(argv)
        if command is not None:
            debug = command.debug
            with warnings.catch_warnings():
                quiet(debug)
                command.run()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("vps: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        return _complain(error)
    finally:
        logging.disable(level)
        (gc.enable if collects else gc.disable)()
    return 0


def _parse(argv: list[str] | None) -> "Command | None":
    """Read the arguments; ``None`` where printing help or version was all they asked for.

    Raises:
        Exception: of Typer, with an exit code of its own; they cannot be used.
        ModuleNotFoundError: typer is missing, or what it needs.
    """
    try:
        import typer
        from typer.main import get_command
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the command needs {error.name}: pip install 'vps-kernels[cli]'"
        ) from None
    from vps.cli.ablate import Ablate, Report
    from vps.cli.calibrate import Calibrate
    from vps.cli.demo import Demo
    from vps.cli.doctor import Doctor
    from vps.cli.evaluate import Eval
    from vps.cli.generate import Generate
    from vps.cli.refine import Refine

    def say_version(asked: bool) -> None:
        if asked:
            print(f"vps {__version__}")
            raise typer.Exit()

    Version = Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=say_version, help="Show the version and exit."
        ),
    ]

    def about(version: Version = False) -> None:
        """Sharpen the linear layers of a language model on the fly."""

    settings = {"help_option_names": ["-h", "--help"]}
    app = typer.Typer(rich_markup_mode=None, epilog=EPILOG, context_settings=settings)
    app.callback()(about)
    for command in (Generate, Refine, Calibrate, Eval, Ablate, Report, Demo, Doctor):
        app.command(command.__name__.lower(), context_settings=settings)(command)
    parser = get_command(app)
    given = list(sys.argv[1:] if argv is None else argv)
    shown = io.StringIO()  # Typer itself would write UTF-8 to an ASCII terminal
    try:
        with redirect_stdout(shown):
            if "_VPS_COMPLETE" in os.environ:  # a shell asks what could come next
                parser.main([], prog_name="vps")
            with parser.make_context("vps", given) as context:
                return parser.invoke(context)
    except (typer.Exit, SystemExit) as end:  # the latter of what completes
        print(shown.getvalue(), end="")
        code = getattr(end, "exit_code", getattr(end, "code", 0))
        if code:
            raise SystemExit(code) from None
        return None


def _complain(error: Exception) -> int:
    """Print one line about an error and return the exit code that it means."""
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if isinstance(error, ModuleNotFoundError) and "pip install" not in message:
        message += how_to_install(error.name)
    message = message.replace(": Value error, ", ": ")  # which Typer takes over from pydantic
    line = " ".join(message.split()) or type(error).__name__
    context = getattr(error, "ctx", None)  # of what Typer refuses
    hint = "" if context is None else f" (see {context.command_path} --help)"
    print(f"vps: error: {line.rstrip('.') if hint else line}{hint}", file=sys.stderr)
    return getattr(error, "exit_code", 1)
