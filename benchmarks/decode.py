"""One step of decoding: the operator on one token, and our Triton GEMV without VPS beside it."""

from __future__ import annotations

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
    from vps.kernels import decode

    if (reason := why_no_gemv(x, weight)) is not None:
        raise ValueError(f"gemv: {reason}")
    return decode.multiply(x, weight, None, None, False, False, False).H.unsqueeze(1)


def why_no_gemv(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernel does not take this product, or ``None``."""
    from vps.kernels import decode

    return decode.refusal(x, weight, 1)
