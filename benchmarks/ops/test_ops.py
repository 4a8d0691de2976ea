"""Time the ops by pytest-benchmark: ``pytest benchmarks --benchmark-only`` and its comparisons.

One call on one input, call by call; for ratios between variants use ``python -m benchmarks.ops``.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import machine
from benchmarks.ops import __main__ as ops
from benchmarks.ops.problem import OpCase

DEVICE = machine.device()
CASES = [case for problem in ops.problems(DEVICE) for case in ops.cases(problem)]
EACH = [
    pytest.param(
        case, name, id=f"{case.name}: {name}", marks=pytest.mark.benchmark(group=case.name)
    )
    for case in CASES
    for name in case.calls
]


@pytest.mark.parametrize(("case", "name"), EACH)
def test_op(benchmark, case: OpCase, name: str) -> None:
    """Check, then time."""
    torch.manual_seed(0)
    with torch.no_grad():
        reason = ops.why_not(case, name, DEVICE)
        if reason is not None and reason.startswith("wrong: "):
            pytest.fail(reason)
        if reason is not None:
            pytest.skip(reason)
        call, arguments = case.calls[name], case.inputs()

        def timed() -> None:
            call(*arguments)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark(timed)
