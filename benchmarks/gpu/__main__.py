"""Visit a GPU: ``python -m benchmarks.gpu smoke`` (under 4 minutes), then ``full`` (under 9).

Each step is a process with a deadline, so one that hangs or breaks the device ends alone. What it
measured is in ``gpu.json`` as soon as it is known, all output in ``gpu-log.txt``; a table comes
last, short enough for a tool that shows the end of the output.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks import results

COMPILERS = 14  # processes that compile kernels, on 16 cores
OPTIONAL = ("build", "harness")  # which need nvcc
TABLE = 11_000  # characters of the table
KERNELS = (
    *("again", "columns", "core", "couple", "decode_together", "delta", "edited", "entropy"),
    *("factors", "features", "scores", "select"),
)
TESTS = (
    *("tests/kernels/test_decode.py", "tests/backends/test_csrc_cuda.py"),
    *("tests/backends/test_cuda.py", *(f"tests/kernels/test_{name}.py" for name in KERNELS)),
    *("tests/model/test_entropy_processor.py", "tests/benchmarks/test_benchmarks_ops.py"),
    "tests/benchmarks/test_benchmarks_variants.py",
)
SECTIONS = ("layer", "ops", "block", "model")


class Step(NamedTuple):
    """Describe a process: its arguments, its deadline, and whether a failure ends the visit."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    is_needed: bool = False


def building(out: Path, seconds: float) -> list[Step]:
    """Return what is built and compiled at once, before anything runs."""
    compilers = [
        Step(
            f"compile {part}",
            ("-m", "benchmarks.gpu.compiling", str(part), str(COMPILERS)),
            seconds,
        )
        for part in range(COMPILERS)
    ]
    harness = ("-m", "benchmarks.gpu.watching", "build", "--out", str(out))
    build = Step("build", ("-m", "vps.backends.cuda_build"), seconds)
    return [build, Step("harness", harness, seconds), *compilers]


def smoke(out: Path, minutes: float) -> list[list[Step]]:
    """Return the steps of a first visit: is it right, and where does the time go?"""
    to = ("--out", str(out))
    share = 60 * minutes / 210
    return [
        building(out, 50 * share),
        [Step("right", ("-m", "benchmarks.gpu.right", *to), 55 * share, is_needed=True)],
        [Step("timing", ("-m", "benchmarks.gpu.timing", *to), 70 * share)],
        [Step("watching", ("-m", "benchmarks.gpu.watching", "run", *to), 35 * share)],
    ]


def full(out: Path, minutes: float) -> list[list[Step]]:
    """Return the steps of a second visit: the tests marked cuda, and the tables."""
    share = 60 * minutes / 480
    workers = ("-n", "12") if _has("xdist") else ()
    limits = ("--timeout", "90") if _has("pytest_timeout") else ()
    tests = ("-m", "pytest", "-q", "-m", "cuda", *workers, *limits, "--maxfail", "15")
    tables = ("-m", "benchmarks", "--minutes", f"{270 * share / 60:.2f}", "--out", str(out))
    return [
        building(out, 45 * share),
        [Step("tests", (*tests, f"--junitxml={out}/cuda.xml", *TESTS), 160 * share)],
        [Step("tables", (*tables, "--only", *SECTIONS), 275 * share)],
    ]


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


def visit(groups: Sequence[Sequence[Step]], out: Path, python: str) -> bool:
    """Run groups of steps, those of one group at once; return whether all succeeded."""
    out.mkdir(parents=True, exist_ok=True)
    path, good = out / "gpu.json", True
    for group in groups:
        with ThreadPoolExecutor(len(group)) as pool:
            found = list(pool.map(lambda step: run(step, out, python), group))
        goes_on = True
        for step, (status, seconds) in zip(group, found, strict=True):
            good = good and (status == "ok" or step.name in OPTIONAL)
            goes_on = goes_on and not (step.is_needed and status.startswith("exit"))
            line = f"{step.name}: {status}, {seconds:.0f} s of {step.seconds:.0f}"
            section = {"status": status, "lines": [line]}
            results.save(path, f"step {step.name}", section, results.VISIT)
            print(line, flush=True)
        if not goes_on:
            print("stopped: nothing more is known of what is not right", flush=True)
            break
    return good


def run(step: Step, out: Path, python: str) -> tuple[str, float]:
    """Run one step; return ``"ok"`` or what became of it, and the seconds that it took."""
    begin, environment = time.monotonic(), os.environ | {"PYTHONUNBUFFERED": "1"}
    environment.setdefault("TRITON_CACHE_DIR", str(Path.cwd() / ".triton"))
    environment["PATH"] += os.pathsep + "/usr/local/cuda/bin"
    process = subprocess.Popen(
        [python, *step.arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=step.seconds)[0]
        status = "ok" if process.returncode == 0 else f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, status = process.communicate()[0], "the time was up"
    seconds = time.monotonic() - begin
    tail = "" if status == "ok" else "\n".join(output.strip().splitlines()[-12:])
    with (out / "gpu-log.txt").open("a") as log:
        log.write(f"== {step.name}: {status}, {seconds:.0f} s\n{output}\n")
    if tail:
        print(f"== {step.name}\n{tail[-1500:]}", flush=True)
    return status, seconds


def table(path: Path) -> str:
    """Return the lines of all sections that have some, at most :data:`TABLE` characters."""
    lines = []
    sections = results.read(path, results.VISIT)
    for name in sorted(sections, key=lambda name: (not name.startswith("step "), name)):
        title = [] if name.startswith("step ") else ["", f"## {name}"]
        lines += [*title, *sections[name]["lines"]]
    text = "\n".join(lines)
    return text if len(text) <= TABLE else text[:TABLE] + "\n(more in gpu.json)"


def main() -> None:
    """Exit with 1 if a step failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("which", choices=["smoke", "full"])
    parser.add_argument("--minutes", type=float, help="3.5 or 8 unless given")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    plan, usual = {"smoke": (smoke, 3.5), "full": (full, 8.0)}[arguments.which]
    good = visit(plan(arguments.out, arguments.minutes or usual), arguments.out, sys.executable)
    print(table(arguments.out / "gpu.json"))
    sys.exit(not good)


if __name__ == "__main__":
    main()
