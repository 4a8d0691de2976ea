"""Small constant tensors, made once per value, dtype and device.

An operation between a tensor and a Python number makes a tensor of the number first, which costs
as much as the operation itself when the tensor is small.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

Value = float | tuple[float, ...] | tuple[int, ...]


def constant(value: Value, like: Tensor) -> Tensor:
    """``value`` in dtype and device of ``like``; not to be written to."""
    return vector(value, like.dtype, like.device)


def vector(value: Value, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``value`` as a tensor, 0-dim or ``[n]``; not to be written to."""
    if not _is_traced():
        return _vector(value, dtype, device)
    if not isinstance(value, tuple):
        return torch.full((), value, dtype=dtype, device=device)
    # Filled where it is used: a copy from the host could not be captured into a graph.
    return torch.stack([torch.full((), item, dtype=dtype, device=device) for item in value])


def tie_breakers(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(offsets, factors)``, float64 ``[width]``, such that ``offsets + factors · scores`` orders
    float32 scores as they are, and equal ones by the lower index.

    Unequal scores differ by 2⁻²⁴ of their value or more, the factors by less than 2⁻³⁰ for widths
    up to 2²²; the offsets, beyond the reach of float32, order zeros.
    """
    make = _make_tie_breakers if _is_traced() else _tie_breakers
    return make(width, device)


def _is_traced() -> bool:
    """Whether a compiler or a mode such as FakeTensorMode makes tensors that must not be kept."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _make_tie_breakers(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    index = torch.arange(width, dtype=torch.float64, device=device)
    return (width - index) * 2.0**-400, 1 - index * 2.0**-52


@lru_cache(maxsize=1024)
def _vector(value: Value, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _tie_breakers(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return _make_tie_breakers(width, device)
