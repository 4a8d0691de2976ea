"""Run a command of this Python in a process of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]


def execute(*command, cwd=ROOT, **environment):
    """Run ``python COMMAND…``; its output is text."""
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def python(code, *arguments, cwd=ROOT, **environment):
    """Run ``python -c CODE ARGUMENTS…``."""
    return execute("-c", textwrap.dedent(code), *arguments, cwd=cwd, **environment)
