"""Check every op in float64, then time it beside the same in plain torch over distinct inputs.

The inputs of a case, at most 64, exceed the cache together unless they are small; on a GPU the
calls are replayed from CUDA graphs. Each row also tells which share of the measured copy bandwidth
or GEMM rate it achieves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import checks, common, machine, results
from benchmarks.baselines import GEMV
from benchmarks.common import Budget, Variant
from benchmarks.ops import kernels, linear, roofline
from benchmarks.ops.problem import Call, OpCase, Problem
from benchmarks.results import Section

OPS = (
    *(kernels.scores, kernels.select, kernels.features, kernels.couple, kernels.factors),
    *(kernels.delta, kernels.edited, kernels.entropy, linear.decode, linear.linear),
)
BYTES = {"cpu": 128 * 2**20, "cuda": 256 * 2**20}
MOST_INPUTS = 64


def problems(device: str) -> Iterator[Problem]:
    """Yield the problems of this device."""
    if device == "cuda":
        for d_in, d_out in ((3584, 3584), (3584, 18944), (8192, 28672)):
            yield Problem(d_in, d_out, 2048, 152064, 4, torch.bfloat16, device)
    else:
        for d_in, d_out in ((576, 1536), (2048, 2048), (896, 4864)):
            for dtype in (torch.float32, torch.bfloat16):
                yield Problem(d_in, d_out, 256, 49152, 4, dtype, device)


def cases(problem: Problem) -> list[OpCase]:
    """Return one case of every op."""
    return [op(problem) for op in OPS]


def why_not(case: OpCase, name: str, device: str) -> str | None:
    """Say why an implementation is not timed: it cannot run, is interpreted, or wrong."""
    call = case.calls[name]
    if isinstance(call, str):
        return call
    if name in ("triton", GEMV) and device == "cpu":
        return "not here: Triton's interpreter on a CPU says nothing of its speed"
    return checks.why_wrong(partial(check, case, name))


def check(case: OpCase, name: str) -> None:
    """Compare one implementation with the oracle on fresh inputs.

    Raises:
        AssertionError: it is wrong.
    """
    call = case.calls[name]
    if case.oracle is None:
        if case.verify is not None and name != case.base:
            case.verify(name)
        return
    assert not isinstance(call, str)
    arguments = case.inputs()
    checks.check(case.name, call(*arguments), case.oracle(*arguments), arguments[0].dtype)


def many_inputs(case: OpCase, device: str) -> list[tuple[Tensor, ...]]:
    """Draw distinct inputs that exceed the cache together, at most 64."""
    first = case.inputs()
    size = sum(a.numel() * a.element_size() for a in first)
    count = min(MOST_INPUTS, max(4, BYTES[device] // size))
    return [first, *(case.inputs() for _ in range(count - 1))]


def run_all(call: Call, inputs: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """Call on every input, and return the last output."""
    for arguments in inputs:
        y = call(*arguments)
    return y


def measure(case: OpCase, device: str, seconds: float, peaks: dict[str, float]) -> results.Case:
    """Time every implementation that is right, and say what share of the peaks it reaches."""
    inputs = many_inputs(case, device)
    found: dict[str, Variant | str] = {}
    for name, call in case.calls.items():
        if (reason := why_not(case, name, device)) is not None:
            found[name] = reason
            continue
        whole = Variant(partial(run_all, call, inputs))
        found[name] = whole if device == "cpu" else common.captured(whole)
    measured = common.measure(found, case.base, seconds, work=len(inputs))
    dtype = inputs[0][0].dtype
    return measured | {"roofline": roofline.shares(measured, case.cost, peaks, dtype)}


def run(seconds: float) -> Section:
    """Measure the section ``ops``."""
    device = machine.device()
    before = machine.clocks()
    torch.manual_seed(0)
    budget = Budget(seconds)
    peaks = roofline.measure_peaks(device)
    every = [case for problem in problems(device) for case in cases(problem)]
    todo = list({case.name: case for case in every}.values())  # one entropy for each vocabulary
    found = {}
    with torch.no_grad():
        for number, case in enumerate(todo):
            if budget.left() <= 0:
                found[case.name] = results.unmeasured(case.base, common.TIME_WAS_UP)
                continue
            seconds = budget.part(len(todo) - number)
            found[case.name] = measure(case, device, seconds, peaks)
            common.show(case.name, found[case.name])
    print(roofline.table(found, peaks))
    return common.section(found, before, peaks=peaks)


if __name__ == "__main__":
    common.command("ops", run, __doc__, seconds=90)
