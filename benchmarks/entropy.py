"""Entropy of the next-token softmax in nats (SPEC §5)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops import OpCase, Problem, triton_or_reason
from benchmarks.roofline import Cost


def case(problem: Problem) -> OpCase:
    """Of one position."""
    vocabulary = problem.vocabulary
    return OpCase(
        name=f"entropy, vocabulary {problem.title(1)}".replace(
            f"{problem.d_in} to {problem.d_out}", str(vocabulary)
        ),
        base="torch",
        inputs=lambda: (problem.normal(1, vocabulary),),
        calls={
            "torch": lambda logits: _entropy(logits, torch.float32),
            "triton": triton_or_reason(_triton),
            "cpp": "not in C++",
        },
        oracle=lambda logits: _entropy(logits, torch.float64),
        cost=Cost(vocabulary * problem.dtype.itemsize, 5 * vocabulary),
    )


def _entropy(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.special.entr(logits.softmax(-1, dtype=dtype)).sum(-1)


def _triton(logits: Tensor) -> Tensor:
    from vps.kernels import entropy

    return entropy.launch(logits)
