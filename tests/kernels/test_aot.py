"""Every kernel compiles for every architecture without a spill, and W is read by 16 bytes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import python

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.aot


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
    assert run.returncode == 0, run.stdout + run.stderr
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
    return compile_with(self, *arguments, **options | {"maxnreg": 40})
aot.JITFunction.run = held
kernels = aot.compiled("sm_90")
print(sum(aot.resources("sm_90", next(kernels)[1])["spills"] > 0 for _ in range(2)))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = python(code, **environment)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 0


def test_a_kernel_that_starts_early_waits_before_it_reads(tmp_path):
    """With PDL each kernel of a step waits before it reads or writes what another leaves."""
    code = """
import re
import torch
from benchmarks import aot
from vps.kernels import tuning
assert not tuning.PDL
tuning.PDL = True
def launches(architecture):
    for I_in in (True, False):
        step = aot.Decode(3584, (3584, 512, 512), 1, torch.bfloat16, 4, (28, 4), selects=I_in)
        yield f"{I_in}", step.launch
for architecture in ("sm_80", "sm_90", "sm_100"):
    for name, kernel in aot.compiled(architecture, launches):
        listing = re.findall(r"\\b(LDG|STG|LDGSTS|ACQBULK|PREEXIT)\\b", aot.disassemble(kernel))
        wait = listing.index("ACQBULK") if "ACQBULK" in listing else None
        before = None if wait is None else listing[:wait]
        after = None if wait is None else listing[wait + 1]
        print(architecture, name, kernel.metadata.launch_pdl, before, after)
"""
    run = python(code, **os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)})
    if "cuobjdump" in run.stderr:
        pytest.skip("no cuobjdump")
    assert run.returncode == 0, run.stderr
    rows = run.stdout.splitlines()
    assert all("False None None" in row for row in rows if row.startswith("sm_80"))
    for architecture in ("sm_90", "sm_100"):
        assert [row.partition(" ")[2] for row in rows if row.startswith(architecture)] == [
            "True: token_kernel False None None",  # it starts as others do, and lets the next start
            "True: gemv_kernel True [] PREEXIT",
            "True: couple_kernel True [] PREEXIT",
            "True: apply_kernel True ['LDG'] LDG",  # I_in, which the kernel before did not write
            "False: gemv_kernel False [] PREEXIT",  # it follows a kernel of somebody else
        ]
