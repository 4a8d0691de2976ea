"""Every kernel compiles for every architecture without a spill, and W is read by 16 bytes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import python

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.aot
# By Triton 3.6, of float32 alone; kernels/README.md.
OLDEST_SPILLS = {
    "sm_80 decode float32: gemv_kernel: 16 spilled",
    "sm_80 decode float32: couple_kernel: 8 spilled",
    "sm_90 decode float32: gemv_kernel: 8 spilled",
}


def compiled(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_spill(architecture):
    run = compiled(architecture)
    known = OLDEST_SPILLS if triton.__version__.startswith("3.6.") else set()
    failures = {line for line in run.stderr.splitlines() if line.startswith(architecture)}
    assert failures <= known and run.returncode == bool(failures), run.stdout + run.stderr
    if "not read" in run.stdout:
        pytest.skip(run.stdout.splitlines()[0])
    head, *rows = run.stdout.splitlines()
    assert head.split()[:3] == [architecture, "registers", "shared"]
    kernels = {row.split(":")[1].split()[0] for row in rows}
    sources = "".join(path.read_text() for path in (ROOT / "kernels").rglob("*.py"))
    launched = re.findall(r"(\w+_kernel)\[|begin\((\w+_kernel)", sources)
    assert kernels == {one or other for one, other in launched} and len(kernels) >= 9
    if architecture == "sm_90":
        assert all(int(row.split()[-1]) > 0 for row in rows if "gemv_kernel" in row)


def test_a_spill_is_seen(tmp_path):
    """The same kernels, held to 40 registers a thread."""
    code = """
import sys
from benchmarks import aot
compile_with = aot.JITFunction.run
def held(self, *arguments, **options):
    return compile_with(self, *arguments, maxnreg=40, **options)
aot.JITFunction.run = held
kernels = aot.compiled("sm_90")
print(sum(aot.resources("sm_90", next(kernels)[1])["spills"] > 0 for _ in range(2)))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = python(code, **environment)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 0
