"""Column scores and energy of H: ``Σ|H|`` per feature and ``mean H²`` (SPEC §2)."""

from __future__ import annotations

from torch import Tensor

from benchmarks.ops import PART, OpCase, Problem, triton_or_reason
from benchmarks.roofline import Cost
from vps.algorithm import selection


def case(problem: Problem) -> OpCase:
    """Scores of the output of a layer."""
    shape = (1, problem.tokens, problem.d_out)
    elements = problem.tokens * problem.d_out
    return OpCase(
        name=f"scores of H, {problem.title(problem.tokens)}",
        base="torch",
        inputs=lambda: (problem.normal(*shape),),
        calls={
            "torch": lambda H: selection.statistics(H, None, None, True)[0],
            "triton": triton_or_reason(_triton),
            "cpp": PART,
        },
        oracle=lambda H: H.double().abs().sum(1),
        cost=Cost(elements * problem.dtype.itemsize, 3 * elements),
    )


def _triton(H: Tensor) -> Tensor:
    from vps.kernels import scores

    return scores.launch(H, None, True)[0]
