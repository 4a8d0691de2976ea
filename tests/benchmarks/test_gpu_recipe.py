"""``make gpu`` with a Python that only notes what it is asked: order, minutes left, exit status."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
echo "$@" >> {log}
case "$2" in
  "import xdist") exit {xdist};;
  vps.backends.cuda_build) exit {build};;
  pytest) exit {tests};;
  benchmarks) exit {benchmarks};;
esac
"""


@pytest.fixture
def run(tmp_path):
    """Runs the recipe with the exit status of each step; its own, and the calls but that to ask
    for xdist."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")

    def run(xdist=1, build=0, tests=0, benchmarks=0, minutes=9):
        python, log = tmp_path / "python", tmp_path / "log"
        log.write_text("")
        statuses = {"xdist": xdist, "build": build, "tests": tests, "benchmarks": benchmarks}
        python.write_text(PYTHON.format(log=log, **statuses))
        python.chmod(0o755)
        command = ["make", "gpu", f"PYTHON={python}", f"OUT={tmp_path / 'out'}"]
        command.append(f"GPU_MINUTES={minutes}")
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return found, [line for line in log.read_text().splitlines() if "xdist" not in line]

    return run


def test_builds_tests_and_times(run, tmp_path):
    found, calls = run()
    out = tmp_path / "out"
    assert found.returncode == 0 and out.is_dir()
    assert calls == [
        "-m vps.backends.cuda_build",
        f"-m pytest -q -m cuda --junitxml={out}/cuda.xml",
        f"-m benchmarks --minutes {calls[2].split()[3]} --out {out}",
    ]
    assert calls[2].split()[3] in ("8", "9")  # of nine, less what the others took


def test_the_cores_share_the_tests_where_xdist_is(run):
    assert "-m cuda -n 8 --junitxml" in run(xdist=0)[1][1]


@pytest.mark.parametrize("failing", ["tests", "benchmarks"])
def test_what_fails_shows_and_the_rest_runs(run, failing):
    found, calls = run(**{failing: 3})
    assert found.returncode != 0 and len(calls) == 3


def test_without_nvcc(run):
    found, calls = run(build=1)
    assert found.returncode == 0 and len(calls) == 3
    assert "the CUDA operator is not built" in found.stdout


def test_a_minute_is_left_to_the_benchmarks(run):
    assert "--minutes 1 " in run(minutes=0)[1][2]
