"""Find, load and call the CUDA operator of csrc/cuda, which decodes one token in one launch.

:mod:`vps.backends.cuda_build` compiles it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
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
)

LIBRARY = Path(__file__).parents[1] / "_cuda.so"


@cache
def why_missing() -> str | None:
    """Load the operator; return why it cannot run here, or ``None``."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no CUDA device"
    if not LIBRARY.is_file():
        return "its library is not built: python -m vps.backends.cuda_build builds it with nvcc"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"its library does not load: {error}"
    torch.library.register_fake("vps::cooperative_decode", _fake)
    return None


def _fake(x: Tensor, weight: Tensor, *others: Any) -> operator.Results:
    """Return results as a tracer sees them; ``t`` is that of a clamp, as for ``vps::linear``."""
    *tensors, policy, entropy, rules, numbers = others
    return operator.fake_linear(x, weight, *tensors, policy, entropy, None, None, rules, numbers)


def why_not(kind: Kind) -> str | None:
    """Return why calls of a kind are not taken, or ``None``."""
    return why_not_native(kind, "cuda")


def run(call: Call) -> Result:
    """Run a call; a query and a key together, and fixed updates, run by the Triton kernels."""
    if call.given.core is not None:
        return operator.run(call)
    return run_native(call, _linear, operator.sharpen_pair, operator.couple)


def _linear(
    inputs: Inputs, settings: Settings, traced: bool, kept: list[Outputs] | None
) -> tuple[Tensor, Tensor]:
    return differentiable(inputs, settings, forward, kept)


def takes(inputs: Inputs, settings: Settings) -> bool:
    """Say whether this call is one token of plain selection, component clip and first order."""
    x, weight = inputs.x, inputs.weight
    return (
        x.shape[:2] == (1, 1)
        and inputs.H is None
        and settings.r <= 8
        and settings.is_plain
        and x.dtype == weight.dtype != torch.float64
        and weight.stride(1) == 1
        and weight.stride(0) >= weight.shape[1]
    )


def forward(inputs: Inputs, settings: Settings) -> Outputs:
    """Compute one token in one launch, and by Triton whatever :func:`takes` refuses."""
    if not takes(inputs, settings):
        from vps.backends import triton_backend

        return triton_backend.forward(inputs, settings)
    x, weight, bias, mask, I_in, I_out, policy, entropy = inputs[:8]
    y, features, core, gamma, t = torch.ops.vps.cooperative_decode(
        x.contiguous(),
        weight,
        bias,
        mask,
        _contiguous(I_in),
        _contiguous(I_out),
        policy,
        entropy,
        *settings.packed(),
    )
    return Outputs(y, features[:, 0], features[:, 1], core, gamma, t)


def _contiguous(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()
