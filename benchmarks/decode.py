"""One step of decoding: the operator on one token, and our Triton GEMV without VPS beside it."""

from __future__ import annotations

import torch
from torch import Tensor

import vps
from benchmarks import checks, linear
from benchmarks.ops import OpCase, Problem
from benchmarks.variants import GEMV, NO_GEMV_IN_CPP


def case(problem: Problem) -> OpCase:
    """One token, beside torch's product alone; what the GEMV gains is the GEMV's, not VPS's."""
    case = linear.case_of(problem, "decode", 1, 1)
    reason = vps.backends()["triton"]
    if reason is not None and problem.device == "cpu":
        reason = NO_GEMV_IN_CPP

    def verify(name: str) -> None:
        if name != GEMV:
            assert case.verify is not None
            case.verify(name)
            return
        x, W = case.inputs()
        checks.check(name, gemv(x, W), x.double() @ W.double().T)

    return case._replace(calls={**case.calls, GEMV: reason or gemv}, verify=verify)


def gemv(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ`` by the kernel that decodes, with everything of VPS left out of it.

    Args:
        x: ``[N, 1, d_in]``, N from 1 to 16.
        weight: ``[d_out, d_in]``.

    Raises:
        ValueError: shapes that the kernel does not take.
    """
    from vps.kernels import decode, tuning

    if (reason := why_no_gemv(x, weight)) is not None:
        raise ValueError(f"gemv: {reason}")
    groups, _, d_in = x.shape
    width = weight.shape[0]
    tile = tuning.gemv(width, x.element_size(), tuning.architecture(x.device))
    H = torch.empty(groups, 1, width, dtype=x.dtype, device=x.device)
    decode.gemv_kernel[tuning.steps(width, tile["BLOCK_O"]),](
        x, weight, None, None, H, None, None, None, None, None, groups, width,
        x.stride(0), x.stride(2), *weight.stride(), 0, D_IN=d_in, R=1, RANKS=1, GROUPS=1,
        BLOCK_N=decode.LARGEST_N, **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return H


def why_no_gemv(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernel does not take this product, or ``None``."""
    from vps.kernels import decode

    return decode.refusal(x, weight, 1)
