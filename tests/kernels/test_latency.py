"""Chains of dependent steps in the kernels that decode stay short, as estimated from their SASS."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import python

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.aot

# Cycles of a step of the loop and of all behind it (10 % above the slower of Triton 3.6 and 3.9).
# A step is 16 KB of W, 8 with 18944 outputs.
BUDGETS = {
    "select 3584: token_kernel": (0, 1676),
    "select 18944: token_kernel": (0, 2276),
    "decode 3584 N=1: gemv_kernel": (470, 1820),
    "decode 3584 N=16: gemv_kernel": (430, 2720),
    "decode 18944 N=1: gemv_kernel": (314, 2470),
    "decode 18944 N=16: gemv_kernel": (320, 3260),
    "decode 3584 N=1: apply_kernel": (0, 2700),
    "decode 18944 N=1: apply_kernel": (0, 4655),
    "decode q, k, v: gemv_kernel": (480, 1880),
    "decode q, k, v: couple_kernel": (0, 5480),
    "decode q, k, v: apply_kernel": (0, 4270),
    "decode gate, up: gemv_kernel": (314, 2470),
    "decode gate, up: apply_kernel": (0, 5130),
}
SNIPPET = """
      /*0000*/                   LDG.E R2, desc[UR4][R4.64] ;         /* 0x0 */
                                                                      /* 0x0 */
      /*0010*/                   REDUX.MAX.S32 UR6, R2 ;              /* 0x0 */
      /*0020*/                   IADD3 R3, R2, R2, RZ ;               /* 0x0 */
      /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;        /* 0x0 */
      /*0040*/                   SHFL.BFLY PT, R3, R3, 0x1, 0x1f ;    /* 0x0 */
      /*0050*/                   ISETP.GT.AND P0, PT, R3, RZ, PT ;    /* 0x0 */
      /*0060*/               @P0 BRA 0x40 ;                           /* 0x0 */
      /*0070*/              @!PT STG.E desc[UR4][R4.64], R3 ;         /* 0x0 */
      /*0080*/                   EXIT ;                               /* 0x0 */
"""


def test_cycles_of_a_chain():
    from benchmarks import latency

    instructions = latency.parse(SNIPPET)
    assert [one.address for one in instructions] == list(range(0, 0x90, 0x10))
    assert latency.loop(instructions) == (0x40, 0x70)
    # The load 270, two more to issue, the barrier 26, then shuffle 24 and comparison 8 a round.
    before = latency.CYCLES["LDG"] + 2 + latency.BARRIER + 1
    a_round = latency.CYCLES["SHFL"] + latency.CYCLES["ISETP"]
    assert latency.cycles(instructions, 4, stop=0x40) == before
    assert latency.cycles(instructions, 4, stop=0x70) > before + a_round
    more = latency.cycles(instructions, 4, trips=3) - latency.cycles(instructions, 4)
    assert more == pytest.approx(2 * a_round, abs=8)


def test_decoding_keeps_its_budget():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.latency"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "no cuobjdump" in run.stderr:
        pytest.skip(run.stderr)
    assert run.returncode == 0, run.stdout + run.stderr
    found = {}
    for row in run.stdout.splitlines()[1:]:
        *name, step, tail, _ = row.split()
        found[" ".join(name)] = int(step), int(tail)
    over = {
        name: found[name] for name, (step, tail) in BUDGETS.items()
        if found[name][0] > step or found[name][1] > tail
    }  # fmt: skip
    assert not over


def test_few_kernels_for_all_batches():
    """Of 1 to 16 tokens there are two products, and one of all else."""
    code = """
import torch
from benchmarks import aot
from vps.kernels.decode import decode
def new(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")
def launches(architecture):
    layer = decode.Layer(new(3584, 3584), None, new(9, dtype=torch.float64))
    for tokens in range(1, 17):
        rest = None, None, None, None, 4, True, 0.8, None
        yield "", lambda: decode.launch(new(tokens, 1, 3584), [layer], *rest)
print(sorted(name for name, _ in aot.compiled("sm_90", launches)))
"""
    run = python(code, **os.environ | {"TRITON_INTERPRET": "0"})
    assert run.returncode == 0, run.stderr
    kernels = ["apply_kernel", "gemv_kernel", "gemv_kernel", "token_kernel"]
    assert run.stdout.strip() == str([f": {name}" for name in kernels])


def test_one_order_of_sums_for_every_batch():
    """No sum of a product's kernel is laid out by the number of tokens along what it adds."""
    code = r"""
import re
import torch
from benchmarks import aot
from vps.kernels.decode import gemv
def new(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")
def order(layout, axis):
    bases = re.findall(r"(register|lane|warp) = (\[\[.*?\]\]|\[\])", layout)
    if not bases:
        return layout
    return [[own for basis in eval(found) if (own := basis[axis])] for _, found in bases]
def sums(kernel):
    text = kernel.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.M))
    pattern = r"tt\.reduce\"\(.*?\) <\{axis = (\d) : i32\}> \(\{\n(.*?)\}\) : \((.*?)\) ->"
    for axis, body, kind in re.findall(pattern, text, re.S):
        if "arith.addf" in body:
            name, axis = re.findall(r"#\w+", kind)[-1], int(axis)
            for dim in re.findall(r"slice<\{dim = (\d)", kind):
                axis += axis >= int(dim)  # of the parent
            yield str((axis, order(layouts[name], axis)))
for dtype in (torch.bfloat16, torch.float32):
    for width in (3584, 18944):
        found = []
        for tokens in (1, 8, 16):
            x, weights = new(tokens, 1, 3584, dtype=dtype), [new(width, 3584, dtype=dtype)]
            I_in = new(tokens, 4, dtype=torch.int64)
            rest = None, I_in, 4, True, True, True
            launch = lambda architecture: [("", lambda: gemv.launch(x, weights, *rest))]
            found += [set(sums(kernel)) for _, kernel in aot.compiled("sm_90", launch)]
        assert found and len(found[0]) >= 4 and all(own == found[0] for own in found), found
"""
    run = python(code, **os.environ | {"TRITON_INTERPRET": "0"})
    assert run.returncode == 0, run.stderr
