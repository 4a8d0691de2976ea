"""Say in which form a layer is sharpened, or why it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from vps.algorithm.policy import PolicyState
from vps.algorithm.weight import FLOATING
from vps.config import VPSConfig

WEIGHT = "weight"


class Form(NamedTuple):
    """How a layer is sharpened.

    Args:
        name: ``"weight"``, or how else W is known.
        attach: a function that sharpens the module where it stands.
    """

    name: str
    attach: Callable[[Any, VPSConfig, PolicyState], Any]


class Refusal(NamedTuple):
    """Why a layer is not sharpened."""

    reason: str


def is_replaced(module: nn.Module) -> bool:
    """Return whether an instance has another forward than its class.

    Accelerate leaves the class's own on the instance when it takes its hook away.
    """
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def why_not_sharpenable(module: nn.Module, expected: type[nn.Module]) -> str | None:
    """Return why ``module`` is not a plain ``expected`` with a floating weight, or ``None``."""
    if type(module) is not expected:
        return f"its type is {type(module).__name__}, expected exactly {expected.__name__}"
    if is_replaced(module):
        return "its forward is replaced on the instance (accelerate offload or tensor parallel)"
    weight = module._parameters.get("weight")
    if weight is None:
        return "it has no weight parameter of its own (weight norm or a parametrization)"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if weight.dtype not in FLOATING:
        return f"its weight is {weight.dtype}, not a 16- to 64-bit float"
    if weight.dim() != 2:
        return f"its weight has shape {tuple(weight.shape)}, expected a matrix"
    return None
