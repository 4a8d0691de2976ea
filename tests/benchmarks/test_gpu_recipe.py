"""``make gpu`` and ``make gpu-smoke`` with a Python that only notes what it is asked, and with none
but this machine: order, minutes, deadlines, exit status, and that every check runs on a CPU."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import common, results
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import compiling, right, timing, watching

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
echo "$@" >> {log}
echo "output of $2"
case "$2" in {cases}
esac
"""


@pytest.fixture
def python(tmp_path):
    """Makes a Python that does what is said for a module, and notes its calls; and these calls."""

    def make(**cases):
        path, log = tmp_path / "python", tmp_path / "log"
        log.write_text("")
        lines = [f"  *{name}) {action};;" for name, action in cases.items()]
        path.write_text(PYTHON.format(log=log, cases="\n".join(lines)))
        path.chmod(0o755)
        return str(path), lambda: log.read_text().splitlines()

    return make


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    "target, which, minutes", [("gpu", "full", 8), ("gpu-smoke", "smoke", 3.5)]
)
def test_make_hands_on_minutes_folder_and_status(python, tmp_path, target, which, minutes):
    for status in (0, 1):
        path, calls = python(gpu=f"exit {status}")
        command = ["make", target, f"PYTHON={path}", f"OUT={tmp_path / 'out'}"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert bool(found.returncode) == bool(status)
        expected = f"-m benchmarks.gpu {which} --minutes {minutes} --out {tmp_path / 'out'}"
        assert calls() == [expected]


@pytest.mark.parametrize("plan, minutes", [(gpu.smoke, 3.5), (gpu.full, 8)])
def test_the_deadlines_end_in_time(plan, minutes, tmp_path):
    """A machine takes over a minute to start, of 15 in all."""
    groups = plan(tmp_path, minutes)
    assert sum(max(step.seconds for step in group) for group in groups) <= 60 * minutes
    first = [step.name for step in groups[0]]
    assert first[:2] == ["build", "harness"] and first[2:] == [f"compile {n}" for n in range(14)]
    rest = [step.name for group in groups[1:] for step in group]
    assert rest == (["right", "timing", "watching"] if plan is gpu.smoke else ["tests", "tables"])


def test_the_tests_and_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_has", lambda module: True)
    (tests,), (tables,) = gpu.full(tmp_path, 8)[1:]
    assert tests.arguments[:7] == ("-m", "pytest", "-q", "-m", "cuda", "-n", "12")
    assert tests.arguments[7:11] == ("--timeout", "90", "--maxfail", "15")
    assert all((ROOT / path).exists() for path in gpu.TESTS)
    assert " ".join(tables.arguments[:4]) == "-m benchmarks --minutes 4.50"
    assert tables.arguments[-4:] == ("layer", "ops", "block", "model")
    monkeypatch.setattr(gpu, "_has", lambda module: False)
    assert "-n" not in gpu.full(tmp_path, 8)[1][0].arguments


def test_every_file_with_a_test_for_gpus_is_named():
    """So that no process imports the others."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text()
        uses = r"^(?:@pytest\.fixture.*\ndef \w+|def test_\w+)\(.*\bdevice[,)]"
        fixture = re.search(uses, text, re.M)
        own = path == Path(__file__) or path.name == "test_policy_state.py"  # a device of its own
        if not own and ("mark.cuda" in text or fixture):
            found.add(str(path.relative_to(ROOT)))
    assert found == set(gpu.TESTS) and gpu.TESTS[0] == "tests/kernels/test_decode.py"


def test_what_fails_shows_and_the_rest_runs(python, tmp_path, capsys):
    path, calls = python(timing="echo broken; exit 3", cuda_build="exit 1")
    out = tmp_path / "out"
    assert not gpu.visit(gpu.smoke(out, 3.5), out, path)
    assert [call.split()[1] for call in calls()[-3:]] == [
        f"benchmarks.gpu.{name}" for name in ("right", "timing", "watching")
    ]
    shown = capsys.readouterr().out
    assert "timing: exit status 3" in shown and "broken" in shown and "watching: ok" in shown
    assert "build: exit status 1" in gpu.table(out / "gpu.json")
    assert "output of benchmarks.gpu.right" in (out / "gpu-log.txt").read_text()


def test_without_nvcc(python, tmp_path, capsys):
    path, _ = python(cuda_build="exit 1", watching="[ $3 = run ]; exit")
    assert gpu.visit(gpu.smoke(tmp_path, 3.5), tmp_path, path)
    shown = capsys.readouterr().out
    assert "build: exit status 1" in shown and "harness: exit status 1" in shown


def test_nothing_is_timed_that_is_not_right(python, tmp_path, capsys):
    path, calls = python(right="exit 1")
    out = tmp_path / "out"
    assert not gpu.visit(gpu.smoke(out, 3.5), out, path)
    assert "benchmarks.gpu.right" in calls()[-1] and "stopped" in capsys.readouterr().out


def test_a_step_that_hangs_is_ended(python, tmp_path):
    path, _ = python(right="sleep 60")
    step = gpu.Step("right", ("-m", "right"), 0.5)
    status, seconds = gpu.run(step, tmp_path, path)
    assert status == "the time was up" and seconds < 20


def test_the_table_fits_a_reply(tmp_path):
    path = tmp_path / "gpu.json"
    results.save(path, "step right", {"lines": ["right: ok"]}, results.VISIT)
    results.save(path, "block", {"lines": ["x" * 100] * 500}, results.VISIT)
    text = gpu.table(path)
    assert text.startswith("right: ok") and len(text) < 12_000 and "more in gpu.json" in text
    with pytest.raises(ValueError, match="no result file"):
        results.read(path)  # and no table of benchmarks takes it for one


@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses on a CPU")
def test_a_rehearsal_on_a_cpu(tmp_path, capsys):
    """The steps of a first visit themselves, in Triton's interpreter and at tiny sizes."""
    compiling.run(0, 1)
    assert right.run(tmp_path) == []
    timing.run(tmp_path, 12)
    assert watching.run(tmp_path)
    text = gpu.table(tmp_path / "gpu.json")
    for part in ("0 wrong", "copy", "7 linears of", "host, torch", "no CUDA", "racecheck", "soak"):
        assert part in text, text


@pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses on a CPU")
def test_checks_that_need_a_gpu_on_a_stand_in(monkeypatch):
    """Streams that do nothing, and graphs that call anew and write where the first call did."""

    def graph_of(call):
        first = call()
        return lambda: first.copy_(call())

    monkeypatch.setattr(common, "graph_of", graph_of)
    for name in ("synchronize", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    torch.manual_seed(0)
    with torch.no_grad():
        for test in (right.twice, right.without_waiting, right.a_replay, right.on_two_streams):
            for tokens in (1, 20):
                test("cpu", tokens, "triton")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.aot
def test_the_harness_compiles(tmp_path):
    line = watching.command("sm_90", "-o", str(tmp_path / "harness"))
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_tests_are_found_with_the_packages_of_the_lent_machine(tmp_path):
    """A finder hides what its image lacks (E9)."""
    hidden = (
        "lm_eval", "torchao", "bitsandbytes", "pint", "math_verify", "latex2sympy2_extended",
        "gguf", "reasoning_gym", "vllm", "datasets", "expecttest", "pebble",
    )  # fmt: skip
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {hidden}:\n"
        "            raise ModuleNotFoundError(f'{name} is hidden', name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    paths = [str(tmp_path), str(ROOT)]
    line = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "--collect-only", *gpu.TESTS]
    found = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-2000:]
    assert "tests collected" in found.stdout and "error" not in found.stdout.lower()
