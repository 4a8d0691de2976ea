"""The clip of the selected rows and columns of W as the core of a layer (SPEC §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops import PART, OpCase, Problem, triton_or_reason
from benchmarks.roofline import SECTOR, Cost

TAU = 0.8


def case(problem: Problem) -> OpCase:
    """``C = diag(1/s_c)`` as ``[1, r, r]``, of a policy that adapts nothing."""
    d_in, d_out, r = problem.d_in, problem.d_out, problem.r
    bytes_moved = r * (d_in * problem.dtype.itemsize + d_out * SECTOR[problem.device])
    policy = torch.tensor(
        [1.0, 0.5, 0.5, r, r, r, r, 1, 1], dtype=torch.float64, device=problem.device
    )

    def triton(W: Tensor, I_in: Tensor, I_out: Tensor) -> Tensor:
        from vps.kernels import factors

        return factors.launch(W, I_in, I_out, policy, None, None, TAU, None)[1]

    return OpCase(
        name=f"factors, {problem.title(problem.tokens)}",
        base="torch",
        inputs=lambda: (
            problem.normal(d_out, d_in),
            problem.features(d_in),
            problem.features(d_out),
        ),
        calls={
            "torch": lambda W, I_in, I_out: _core(W, I_in, I_out, torch.float32),
            "triton": triton_or_reason(triton),
            "cpp": PART,
        },
        oracle=lambda W, I_in, I_out: _core(W, I_in, I_out, torch.float64),
        cost=Cost(bytes_moved, 2 * r * (d_in + d_out)),
    )


def _core(W: Tensor, I_in: Tensor, I_out: Tensor, dtype: torch.dtype) -> Tensor:
    norm = torch.linalg.vector_norm
    A = norm(W.index_select(0, I_out[0]), dim=1, dtype=dtype)
    B = norm(W.index_select(1, I_in[0]), dim=0, dtype=dtype)
    return torch.diag((A * B / TAU).clamp_min(1).reciprocal())[None]
