"""Say which calls Triton takes, and run them on a GPU or in the interpreter.

:mod:`vps.backends.triton_backend` puts the kernels together; it is imported at the first call.
"""

from __future__ import annotations

import os
from functools import cache
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

_modes = torch._C._len_torch_dispatch_stack
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
    """Run a call: a step of a few tokens straight by its kernels, all else by the operator.

    Of a step alone there may be more layers than one, or than a query and a key. On a CPU the
    interpreter takes the place of the operator.
    """
    if (found := _step(call)) is not None:
        return found
    if len(call.layers) > (1 if call.heads is None else 2):
        return _one_after_the_other(call)
    if call.x.is_cuda:
        return operator.run(call)
    if call.given.core is not None:
        return operator.run_fixed(call, operator.triton_edited)
    return run_native(call, _interpreted, _pair, _couple)


def _step(call: Call) -> Result | None:
    """Return what the kernels of a few tokens compute without an operator, if nobody looks on."""
    x, given = call.x, call.given
    if x.shape[1] != 1 or call.traced or call.held is not None or given.core is not None:
        return None
    if type(x) is not Tensor or given.I_out is not None or given.energy is not None or _modes():
        return None
    if torch.is_grad_enabled() and call.needs_gradient():
        return None
    step = _kernels().step(call)
    return step  # type: ignore[no-any-return]


@cache
def _kernels() -> Any:
    from vps.backends import triton_backend

    return triton_backend


def _one_after_the_other(call: Call) -> Result:
    """Run each layer by itself, but for a query and a key."""
    first = 1 if call.heads is None else 2
    ys, I_in = run(call._replace(layers=call.layers[:first]))
    given = call.given._replace(I_in=I_in)
    for layer in call.layers[first:]:
        ys += run(call._replace(layers=(layer,), heads=None, given=given))[0]
    return ys, I_in


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
