"""Show progress and two columns on a terminal, and no notices of libraries."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import logging
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator
from importlib import util
from typing import Any, TextIO

DELAY = 2.0  # seconds that a step may take before it is shown


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Make both streams take every letter and be there to write to, for the length of a command.

    Letters outside a terminal's encoding are written as JSON escapes them, so JSON stays JSON.
    """
    codecs.register_error("vps.escape", _escaped)
    codecs.register_error("vps.bytes", _bytes_or_escaped)
    before: list[tuple[io.TextIOWrapper, str]] = []
    silent = None
    if sys.stderr is None:  # print would write to standard output instead
        silent = sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            before.append((stream, stream.errors))
            # Under "surrogateescape" names of files are written as the bytes that they are.
            stream.reconfigure(errors="vps.escape" if stream.errors == "strict" else "vps.bytes")
    try:
        yield
    finally:
        for stream, errors in before:
            try:
                stream.reconfigure(errors=errors)  # which flushes it
            except OSError:  # Python would try again at its end, and complain
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if silent is not None:
            silent.close()
            sys.stderr = None  # type: ignore[assignment]


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _bytes_or_escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return _escaped(error)


def quiet(debug: bool) -> None:
    """Keep the libraries' own notices off the terminal, except under ``--debug``."""
    if debug:
        return
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for ours in ("VPSConfig: ", "load_model: "):
        warnings.filterwarnings("always", ours)
    stream = sys.stderr  # which bars are kept off where the warning may come
    warnings.showwarning = lambda message, *_, **__: warn(message, stream)


def warn(message: object, stream: TextIO | None = None) -> None:
    """Print a warning as one line of ours."""
    print(f"vps: warning: {message}", file=sys.stderr if stream is None else stream)


def quiet_transformers(debug: bool) -> None:
    """Turn off the notices and bars of transformers; :class:`Progress` shows our own."""
    if debug or util.find_spec("transformers") is None:
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as notices

    notices.set_verbosity_error()
    notices.disable_progress_bar()


def muted(debug: bool) -> contextlib.AbstractContextManager[Any]:
    """Keep bars off standard error that no setting of their library turns off (GGUF files)."""
    return contextlib.nullcontext() if debug else contextlib.redirect_stderr(io.StringIO())


class Progress:
    """Show a line on a terminal for every step that takes over two seconds; silent elsewhere.

    A context, whose end ends the last step.

    Args:
        wanted: False for silence on a terminal too.
    """

    def __init__(self, wanted: bool = True) -> None:
        self._stream = sys.stderr
        self._shown = wanted and self._stream.isatty()
        self._bar: Any = None
        self._start: threading.Timer | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, message: str, total: int | None = None) -> None:
        """Begin a step, of ``total`` parts where they can be counted, and end the one before."""
        self.close()
        if not self._shown:
            return
        from rich import progress
        from rich.console import Console

        console = Console(file=self._stream)
        if not console.is_interactive:  # such as an editor's, which cannot take a line away
            return
        counted = () if total is None else (progress.BarColumn(), progress.MofNCompleteColumn())
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            *counted,
            progress.TimeElapsedColumn(),
            console=console,
            transient=True,
            refresh_per_second=2,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._bar.add_task(message, total=total)
        self._start = threading.Timer(DELAY, self._bar.start)
        self._start.daemon = True
        self._start.start()

    def advance(self) -> None:
        """Count one part as done."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])

    def close(self) -> None:
        """End the step and take its line away."""
        if self._bar is not None and self._start is not None:
            self._start.cancel()
            self._start.join()
            self._bar.stop()
            self._bar = None


class GrowingColumns:
    """Show two texts side by side while they grow, where :class:`Progress` would show a line.

    A context, whose end takes them away.
    """

    def __init__(self) -> None:
        self._texts = {"plain": "", "sharpened": ""}
        self._live: Any = None

    def __enter__(self) -> GrowingColumns:
        if not sys.stderr.isatty():
            return self
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        console = Console(file=sys.stderr)

        def drawn() -> Text:
            lines = side_by_side(**self._texts).splitlines()
            room = max(1, console.height - 3)  # for the end of what is longer than the terminal
            return Text("\n".join([*lines[:2], *lines[2:][-room:]]))

        if console.is_interactive:
            self._live = Live(
                get_renderable=drawn, console=console, refresh_per_second=8, transient=True,
                redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def plain(self, piece: str) -> None:
        """Add to the plain text."""
        self._texts["plain"] += piece

    def sharpened(self, piece: str) -> None:
        """Add to the sharpened text."""
        self._texts["sharpened"] += piece


def side_by_side(plain: str, sharpened: str) -> str:
    """Lay two texts out in two columns as wide as the terminal allows; without any colour."""
    from rich.box import Box
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    lines = Box("    \n  | \n -| \n  | \n  | \n  | \n  | \n    \n", ascii=True)
    columns = [Column(name, overflow="fold", ratio=1) for name in ("plain", "sharpened")]
    table = Table(*columns, box=lines, show_edge=False, expand=True, pad_edge=False)
    table.add_row(Text(plain), Text(sharpened))
    width = max(23, shutil.get_terminal_size().columns)
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def difference_line(position: int | None) -> str:
    """Say where two continuations part."""
    if position is None:
        return "no token differs"
    return f"first difference at generated token {position + 1}"
