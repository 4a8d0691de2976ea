"""Norms of the selected rows and columns of W, all that clip and core need of it (SPEC §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops import PART, OpCase, Problem, triton_or_reason
from benchmarks.roofline import SECTOR, Cost


def case(problem: Problem) -> OpCase:
    """``‖A_c‖`` and ``‖B_c‖`` as ``[2, 1, r]``."""
    d_in, d_out, r = problem.d_in, problem.d_out, problem.r
    bytes_moved = r * (d_in * problem.dtype.itemsize + d_out * SECTOR[problem.device])
    return OpCase(
        name=f"factors, {problem.title(problem.tokens)}",
        base="torch",
        inputs=lambda: (
            problem.normal(d_out, d_in),
            problem.features(d_in),
            problem.features(d_out),
        ),
        calls={
            "torch": lambda W, I_in, I_out: _norms(W, I_in, I_out, torch.float32),
            "triton": triton_or_reason(_triton),
            "cpp": PART,
        },
        oracle=lambda W, I_in, I_out: _norms(W, I_in, I_out, torch.float64),
        cost=Cost(bytes_moved, 2 * r * (d_in + d_out)),
    )


def _norms(W: Tensor, I_in: Tensor, I_out: Tensor, dtype: torch.dtype) -> Tensor:
    norm = torch.linalg.vector_norm
    rows = W.index_select(0, I_out[0])
    columns = W.index_select(1, I_in[0])
    return torch.stack([norm(rows, dim=1, dtype=dtype), norm(columns, dim=0, dtype=dtype)])[:, None]


def _triton(W: Tensor, I_in: Tensor, I_out: Tensor) -> Tensor:
    from vps.kernels import factors

    return torch.stack(factors.launch_norms(W, I_in, I_out))
