"""Describe one op on the layer that it belongs to: its inputs, implementations, oracle and cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import vps
from benchmarks import shapes
from benchmarks.ops.roofline import Cost

PART = "in C++ it is a part of one operator: see linear and decode"

Call = Callable[..., Tensor]


class Problem(NamedTuple):
    """Describe the layer that the ops belong to."""

    d_in: int
    d_out: int
    tokens: int
    vocabulary: int
    r: int
    dtype: torch.dtype
    device: str

    def normal(self, *shape: int) -> Tensor:
        """Draw random numbers of this dtype, never zeros."""
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def features(self, size: int) -> Tensor:
        """Draw distinct indices ``[1, r]``."""
        return torch.randperm(size, device=self.device)[None, : self.r]

    def title(self, tokens: int) -> str:
        """Name the problem, such as ``"3584 to 18944, N = 2048, bfloat16"``."""
        return f"{self.d_in} to {self.d_out}, N = {tokens}, {shapes.title(self.dtype)}"


class OpCase(NamedTuple):
    """Describe one op on one problem.

    Args:
        name: the op and its problem.
        base: the implementation that the others are compared with.
        inputs: new random inputs.
        calls: implementations by name; a string is the reason why one cannot run here.
        cost: bytes and floating-point operations that any implementation must spend.
        oracle: what is right, given the same inputs; or
        verify: raises unless the implementation of that name is right, for all but the base.
    """

    name: str
    base: str
    inputs: Callable[[], tuple[Tensor, ...]]
    calls: dict[str, Call | str]
    cost: Cost
    oracle: Call | None = None
    verify: Callable[[str], None] | None = None


def triton_or_reason(call: Call) -> Call | str:
    """Return the kernel where it can run, also in the interpreter, or the reason why not."""
    reason = vps.backends()["triton"]
    return call if reason is None else f"not here: {reason}"


def of_kernel(
    name: str,
    inputs: Callable[[], tuple[Tensor, ...]],
    plain: Call,
    triton: Call,
    oracle: Call,
    cost: Cost,
    cpp: Call | str = PART,
) -> OpCase:
    """Return the case of a Triton kernel beside plain torch; ``cpp`` may say why there is none."""
    calls: dict[str, Call | str] = {"torch": plain, "triton": triton_or_reason(triton), "cpp": cpp}
    return OpCase(name, "torch", inputs, calls, cost, oracle)
