"""What a query and a key projection select together, from their scores (SPEC §7)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops import PART, OpCase, Problem, triton_or_reason
from benchmarks.roofline import Cost
from vps.algorithm import coupling

KEYS = 4  # seven query heads share a key head, as in Qwen2.5-7B
SHARING = 7


def case(problem: Problem) -> OpCase:
    """Joint selection, from scores that hold ties; a key has a seventh of the layer's features."""
    size = max(1, problem.d_out // (KEYS * SHARING))
    d_q, d_k = KEYS * SHARING * size, KEYS * size
    heads = KEYS * SHARING

    def of_torch(s_q: Tensor, s_k: Tensor, I_in: Tensor) -> Tensor:
        return torch.stack(coupling.select(s_q, s_k, problem.r, heads, KEYS), 1)

    def triton(s_q: Tensor, s_k: Tensor, I_in: Tensor) -> Tensor:
        from vps.kernels import couple

        energies = [s_q[:, 0], s_k[:, 0]]
        return couple.launch(s_q, s_k, energies, None, I_in, heads, KEYS)[1][:, 1:]

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        s_q, s_k = (
            torch.rand(1, width, device=problem.device).mul_(512).floor_() for width in (d_q, d_k)
        )
        return s_q, s_k, problem.features(problem.d_in)

    def oracle(*scores: Tensor) -> Tensor:
        return of_torch(*(z.cpu() for z in scores)).to(scores[0].device)

    return OpCase(
        name=f"couple, {heads} heads and {KEYS} of {size}",
        base="torch",
        inputs=inputs,
        calls={"torch": of_torch, "triton": triton_or_reason(triton), "cpp": PART},
        oracle=oracle,
        cost=Cost(4 * (d_q + d_k), d_q + d_k),
    )
