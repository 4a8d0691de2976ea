"""What the terminal shows: progress, two columns, and no notices of libraries."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
import warnings
from importlib import util
from typing import Any


def quiet(debug: bool) -> None:
    """Keep the libraries' own notices off the terminal; one clear line is ours to write."""
    if debug:
        return
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", "VPSConfig: ")
    warnings.showwarning = _say


def _say(message: Warning | str, *_: Any, **__: Any) -> None:
    """Show a warning as one line of ours."""
    print(f"vps: warning: {message}", file=sys.stderr)


def quiet_transformers(debug: bool) -> None:
    """No notices and no bars of transformers; :class:`Progress` shows our own."""
    if debug or util.find_spec("transformers") is None:
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as notices

    notices.set_verbosity_error()
    notices.disable_progress_bar()


def muted(debug: bool) -> contextlib.AbstractContextManager[Any]:
    """Keeps bars off standard error that no setting of their library turns off (GGUF files)."""
    return contextlib.nullcontext() if debug else contextlib.redirect_stderr(io.StringIO())


class Progress:
    """A tqdm line on a terminal, for every step that takes over two seconds; silent elsewhere.

    Args:
        wanted: False for silence on a terminal too.
    """

    def __init__(self, wanted: bool = True) -> None:
        self._stream = sys.stderr
        self._shown = wanted and self._stream.isatty() and util.find_spec("tqdm") is not None
        self._bar: Any = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def step(self, message: str, total: int | None = None) -> None:
        """Begin a step, of ``total`` parts where they can be counted; ends the one before."""
        self.close()
        if not self._shown:
            return
        from tqdm import tqdm

        layout = "{desc} [{elapsed}]" if total is None else "{desc} {bar} {n}/{total} [{elapsed}]"
        self._bar = tqdm(
            desc=message, total=total, delay=2, leave=False, file=self._stream,
            bar_format=layout, miniters=0,
        )  # fmt: skip
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._tick, args=(self._bar, self._over), daemon=True
        )
        self._thread.start()

    @staticmethod
    def _tick(bar: Any, over: threading.Event) -> None:
        while not over.wait(0.5):
            bar.update(0)

    def advance(self) -> None:
        """One part is done."""
        if self._bar is not None:
            self._bar.update(1)

    def close(self) -> None:
        """End the step and take its line away."""
        if self._bar is not None:
            self._over.set()
            if self._thread is not None:
                self._thread.join()
            self._bar.close()
            self._bar = None


def side_by_side(plain: str, sharpened: str) -> str:
    """Two texts in two columns as wide as the terminal allows."""
    import shutil
    import textwrap
    from itertools import zip_longest

    width = max(20, (shutil.get_terminal_size().columns - 3) // 2)
    columns = []
    for title, text in (("plain", plain), ("sharpened", sharpened)):
        lines = [title, "-" * width]
        for line in text.splitlines():
            lines += textwrap.wrap(line, width) or [""]
        columns.append(lines)
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(f"{left:<{width}} | {right}".rstrip() for left, right in rows)


def difference_line(position: int | None) -> str:
    """Where two continuations part, in words."""
    if position is None:
        return "no token differs"
    return f"first difference at generated token {position + 1}"
