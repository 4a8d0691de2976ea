"""The r largest of a feature's scores, ties to the lower index (SPEC §3)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops import PART, OpCase, Problem, triton_or_reason
from benchmarks.roofline import Cost
from vps import reference
from vps.algorithm import selection


def case(problem: Problem) -> OpCase:
    """Selection of output features, from scores that hold ties."""

    def triton(scores: Tensor) -> Tensor:
        from vps.kernels import select

        return select.launch(scores, problem.r)

    def inputs() -> tuple[Tensor]:
        return (torch.rand(1, problem.d_out, device=problem.device).mul_(512).floor_(),)

    return OpCase(
        name=f"select, {problem.title(problem.tokens)}",
        base="torch",
        inputs=inputs,
        calls={
            "torch": lambda scores: selection.top_k(scores, problem.r),
            "triton": triton_or_reason(triton),
            "cpp": PART,
        },
        oracle=lambda scores: reference.top_k(scores[0], problem.r)[None],
        cost=Cost(4 * problem.d_out, problem.d_out),
    )
