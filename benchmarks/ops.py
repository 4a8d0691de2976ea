"""Every op beside the same in plain torch: checked in float64, then timed over distinct inputs.

The inputs of a case, at most 64, exceed the cache together unless they are small; on a GPU the
calls are replayed from CUDA graphs.
Each row also tells which share of the measured copy bandwidth or GEMM rate it achieves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import vps
from benchmarks import checks, common, machine, results, roofline, shapes, variants
from benchmarks.common import Budget, Variant
from benchmarks.results import Section
from benchmarks.roofline import Cost
from benchmarks.variants import GEMV

PART = "in C++ it is a part of one operator: see linear and decode"
BYTES = {"cpu": 128 * 2**20, "cuda": 256 * 2**20}
MOST_INPUTS = 64

Call = Callable[..., Tensor]


class Problem(NamedTuple):
    """The layer that the ops belong to."""

    d_in: int
    d_out: int
    tokens: int
    vocabulary: int
    r: int
    dtype: torch.dtype
    device: str

    def normal(self, *shape: int) -> Tensor:
        """Random numbers of this dtype, never zeros."""
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def features(self, size: int) -> Tensor:
        """Random distinct indices ``[1, r]``."""
        return torch.randperm(size, device=self.device)[None, : self.r]

    def title(self, tokens: int) -> str:
        """Such as ``"3584 to 18944, N = 2048, bfloat16"``."""
        return f"{self.d_in} to {self.d_out}, N = {tokens}, {shapes.title(self.dtype)}"


class OpCase(NamedTuple):
    """One op on one problem.

    Args:
        name: the op and its problem.
        base: the implementation that the others are compared with.
        inputs: new random inputs.
        calls: implementations by name; a string is the reason why one cannot run here.
        cost: bytes and floating-point operations that any implementation must spend.
        oracle: what is right, given the same inputs; or
        verify: raises unless the implementation of that name is right, for all but the base.
    """

    name: str
    base: str
    inputs: Callable[[], tuple[Tensor, ...]]
    calls: dict[str, Call | str]
    cost: Cost
    oracle: Call | None = None
    verify: Callable[[str], None] | None = None


def triton_or_reason(call: Call) -> Call | str:
    """The kernel where it can run, be it in the interpreter, which is checked and never timed."""
    reason = vps.backends()["triton"]
    return call if reason is None else f"not here: {reason}"


def problems(device: str) -> Iterator[Problem]:
    """What is run on this device."""
    if device == "cuda":
        for d_in, d_out in ((3584, 3584), (3584, 18944), (8192, 28672)):
            yield Problem(d_in, d_out, 2048, 152064, 4, torch.bfloat16, device)
    else:
        for d_in, d_out in ((576, 1536), (2048, 2048), (896, 4864)):
            for dtype in (torch.float32, torch.bfloat16):
                yield Problem(d_in, d_out, 256, 49152, 4, dtype, device)


def cases(problem: Problem) -> list[OpCase]:
    """One case of every op."""
    from benchmarks import (
        couple,
        decode,
        delta,
        entropy,
        factors,
        features,
        linear,
        scores,
        select,
    )

    modules = (scores, select, features, couple, factors, delta, entropy, decode, linear)
    return [module.case(problem) for module in modules]


def why_not(case: OpCase, name: str, device: str) -> str | None:
    """Why an implementation is not timed: it cannot run, is interpreted, or wrong."""
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
    """Distinct inputs that exceed the cache together, at most 64."""
    first = case.inputs()
    size = sum(a.numel() * a.element_size() for a in first)
    count = min(MOST_INPUTS, max(4, BYTES[device] // size))
    return [first, *(case.inputs() for _ in range(count - 1))]


def run_all(call: Call, inputs: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """``call`` on every input; the last output."""
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
        found[name] = whole if device == "cpu" else variants.captured(whole)
    measured = common.measure(found, case.base, seconds, work=len(inputs))
    dtype = inputs[0][0].dtype
    return measured | {"roofline": roofline.shares(measured, case.cost, peaks, dtype)}


def run(seconds: float) -> Section:
    """The section ``ops``."""
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
                found[case.name] = results.case(
                    case.base, {case.base: results.empty(common.TIME_WAS_UP)}
                )
                continue
            seconds = budget.part(len(todo) - number)
            found[case.name] = measure(case, device, seconds, peaks)
            common.show(case.name, found[case.name])
    print(roofline.table(found, peaks))
    return common.section(found, before, peaks=peaks)


if __name__ == "__main__":
    common.command("ops", run, __doc__, seconds=90)
