"""Say which calls Triton takes, and run them on a GPU or in the interpreter.

:mod:`vps.backends.triton_backend` puts the kernels together; it is imported at the first call.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vps.algorithm.policy import Settings
from vps.backends import operator
from vps.backends.call import (
    Call,
    Inputs,
    Kind,
    Outputs,
    Result,
    differentiable,
    run_native,
    why_not_native,
)  # fmt: skip

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def why_missing() -> str | None:
    """Return why Triton cannot run on this machine, or ``None``."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'vps-kernels[gpu]'"
    if not (torch.cuda.is_available() or INTERPRETED):
        return "no CUDA or ROCm device (TRITON_INTERPRET=1 runs it slowly on a CPU)"
    return None


def why_not(kind: Kind) -> str | None:
    """Return why the kernels do not take calls of a kind, or ``None``."""
    interpreted = INTERPRETED and kind.device == "cpu"
    return why_not_native(kind, "cpu" if interpreted else "cuda")


def run(call: Call) -> Result:
    """Run a call through the operator, or in the interpreter on a CPU."""
    if call.x.is_cuda:
        return operator.run(call)
    if call.given.core is not None:
        return operator.run_fixed(call, operator.triton_edited)
    return run_native(call, _interpreted, _pair, _couple)


def _interpreted(
    inputs: Inputs, settings: Settings, traced: bool, kept: list[Outputs] | None
) -> tuple[Tensor, Tensor]:
    from vps.backends import triton_backend

    return differentiable(inputs, settings, triton_backend.forward, kept)


def _pair(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from vps.backends import triton_backend

    with torch._C._AutoDispatchBelowAutograd():
        return triton_backend.pair(*arguments)


def _couple(*arguments: Any) -> Any:
    from vps.backends import triton_backend

    with torch.no_grad():
        return triton_backend.couple(*arguments)
