"""The update: ``H + γ·H[:, I_out] C Bᵀ`` with ``B = W[:, I_in]`` (SPEC §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops import PART, OpCase, Problem, triton_or_reason
from benchmarks.roofline import SECTOR, Cost
from vps.algorithm import gradient, torch_backend

GAMMA = 0.5


def case(problem: Problem) -> OpCase:
    """The update of a whole layer, with the identity for a core."""
    d_in, d_out, tokens, r = problem.d_in, problem.d_out, problem.tokens, problem.r
    core = torch.eye(r, device=problem.device)[None]
    gamma = torch.full((1,), GAMMA, device=problem.device)

    def triton(H: Tensor, W: Tensor, I_in: Tensor, I_out: Tensor) -> Tensor:
        from vps.kernels import delta

        return delta.launch(H, None, W, I_in, I_out, core, gamma, None, None)[0]

    elements = tokens * d_out
    bytes_moved = 2 * elements * problem.dtype.itemsize + r * d_out * SECTOR[problem.device]
    return OpCase(
        name=f"delta, {problem.title(tokens)}",
        base="torch",
        inputs=lambda: (
            problem.normal(1, tokens, d_out),
            problem.normal(d_out, d_in) * d_in**-0.5,
            problem.features(d_in),
            problem.features(d_out),
        ),
        calls={"torch": _torch, "triton": triton_or_reason(triton), "cpp": PART},
        oracle=lambda H, W, I_in, I_out: _torch(H.double(), W.double(), I_in, I_out),
        cost=Cost(bytes_moved, 2 * r * elements),
    )


def _torch(H: Tensor, W: Tensor, I_in: Tensor, I_out: Tensor) -> Tensor:
    u = torch_backend.selected(H, I_out) * GAMMA
    return torch.baddbmm(H, u, gradient.columns(W, I_in).permute(1, 2, 0))
