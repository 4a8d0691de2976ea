"""The r features of H with the largest scores: ``Σ|H|`` per feature, then top-k (SPEC §2, §3)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops import PART, OpCase, Problem, triton_or_reason
from benchmarks.roofline import Cost
from vps import reference
from vps.algorithm import selection


def case(problem: Problem) -> OpCase:
    """Selection of output features, from small integers, whose sums are exact and hold ties."""
    shape = (1, problem.tokens, problem.d_out)
    elements = problem.tokens * problem.d_out

    def inputs() -> tuple[Tensor]:
        return (torch.randint(-9, 10, shape, device=problem.device).to(problem.dtype),)

    def plain(H: Tensor) -> Tensor:
        return selection.top_k(selection.statistics(H, None, None, True)[0], problem.r)

    def triton(H: Tensor) -> Tensor:
        from vps.kernels import features

        return features.launch(H, None, problem.r, True)[0]

    return OpCase(
        name=f"features of H, {problem.title(problem.tokens)}",
        base="torch",
        inputs=inputs,
        calls={"torch": plain, "triton": triton_or_reason(triton), "cpp": PART},
        oracle=lambda H: reference.top_k(H[0].double().abs().sum(0), problem.r)[None],
        cost=Cost(elements * problem.dtype.itemsize, 3 * elements),
    )
