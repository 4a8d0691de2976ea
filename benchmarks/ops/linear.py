"""Run the operator ``vps::linear`` by backend, selection included, for many tokens and for one.

The check compares the selected features exactly, beside the output (SPEC §1–§5).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vps
from benchmarks import baselines, checks
from benchmarks.baselines import GEMV, NO_GEMV_IN_CPP
from benchmarks.ops.problem import Call, OpCase, Problem
from benchmarks.ops.roofline import Cost
from benchmarks.variants import BACKENDS, CONFIG, why_not
from vps.algorithm import policy
from vps.algorithm.policy import Settings
from vps.backends import cuda, operator, torch_backend
from vps.backends.call import Inputs, Outputs

Forward = Callable[[Inputs, Settings], Outputs]
PRODUCT = "product alone"


def linear(problem: Problem) -> OpCase:
    """Prefill one sequence."""
    return _case(problem, "linear", 1, problem.tokens)


def decode(problem: Problem) -> OpCase:
    """Decode one token, beside our Triton GEMV without VPS."""
    case = _case(problem, "decode", 1, 1)
    reason = vps.backends()["triton"]
    if reason is not None and problem.device == "cpu":
        reason = NO_GEMV_IN_CPP

    def verify(name: str) -> None:
        if name != GEMV:
            assert case.verify is not None
            case.verify(name)
            return
        x, W = case.inputs()
        checks.check(name, baselines.gemv(x, W), x.double() @ W.double().T)

    return case._replace(calls={**case.calls, GEMV: reason or baselines.gemv}, verify=verify)


def _case(problem: Problem, name: str, groups: int, tokens: int) -> OpCase:
    """Return the operator on x ``[groups, tokens, d_in]``, beside the product alone."""
    d_in, d_out, rows = problem.d_in, problem.d_out, groups * tokens
    settings = policy.settings(CONFIG, False, d_in, d_out)
    assert settings is not None
    numbers = policy.bounds(CONFIG, 1.0)
    numbers = torch.tensor(numbers, dtype=torch.float64, device=problem.device)

    def layer() -> nn.Linear:
        return checks.linear(d_in, d_out, problem.dtype, problem.device)

    def inputs() -> tuple[Tensor, Tensor]:
        x = checks.activations(groups, tokens, d_in, problem.dtype, problem.device)
        return x, layer().weight

    def sharpened(backend: str, x: Tensor, W: Tensor) -> Outputs:
        given = Inputs(x, W, None, None, None, None, numbers, None)
        return _forward(backend)(given, settings)

    def verify(backend: str) -> None:
        fresh = layer()
        clear = checks.clear_case(fresh, groups, tokens, CONFIG)
        out = sharpened(backend, clear.x, fresh.weight)
        checks.check("I_in", out.I_in, clear.I_in)
        checks.check("I_out", out.I_out, clear.I_out)
        checks.check("y", out.y, clear.y)

    probe = torch.empty(groups, tokens, 0, device=problem.device)
    calls: dict[str, Call | str] = {PRODUCT: F.linear}
    for backend in BACKENDS:
        # In Triton's interpreter the kernels are checked, and not timed.
        reason = vps.backends()[backend] if backend == "triton" else why_not(backend, probe)
        calls[backend] = partial(_output, sharpened, backend) if reason is None else reason
    elements = d_in * d_out + rows * (d_in + d_out)
    return OpCase(
        name=f"{name}, {problem.title(rows)}",
        base=PRODUCT,
        inputs=inputs,
        calls=calls,
        verify=verify,
        cost=Cost(elements * problem.dtype.itemsize, 2 * rows * d_in * d_out),
    )


def _output(
    sharpened: Callable[[str, Tensor, Tensor], Outputs], backend: str, x: Tensor, W: Tensor
) -> Tensor:
    return sharpened(backend, x, W).y


def _forward(backend: str) -> Forward:
    if backend == "torch":
        return torch_backend.forward
    if backend == "cpp":
        return operator.forward
    if backend == "cuda":
        return cuda.forward
    from vps.backends import triton_backend

    return triton_backend.forward
