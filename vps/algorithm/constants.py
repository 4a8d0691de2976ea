"""Small constant tensors and settled choices, made once.

An operation between a tensor and a Python number makes a tensor of the number first, which costs
as much as the operation itself when the tensor is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = float | tuple[float, ...] | tuple[int, ...]
F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def _untraced() -> Iterator[None]:
    """Keep what is made inside out of the graph of ``torch.jit.trace``, which has it as a constant
    the next time."""
    state = torch._C._get_tracing_state()
    if state is None:  # nothing to pause, where it may not be set either
        yield
        return
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def kept(function: F) -> F:
    """``function`` with its results kept by arguments, except while a tracer runs.

    The tensors that a compiler, or a mode such as FakeTensorMode, makes belong to it alone.
    """

    @lru_cache(maxsize=4096)
    def keep(*arguments: Any) -> Any:
        # Outside of inference mode, and of vmap, which would not let a seed draw.
        with torch.inference_mode(False), torch._C._DisableFuncTorch(), _untraced():
            return function(*arguments)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
            return function(*arguments)
        return keep(*arguments)

    return call  # type: ignore[return-value]


def constant(value: Value, like: Tensor) -> Tensor:
    """``value`` in dtype and device of ``like``; not to be written to."""
    return vector(value, like.dtype, like.device)


@kept
def vector(value: Value, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``value`` as a tensor, 0-dim or ``[n]``; not to be written to."""
    if not torch.compiler.is_compiling():
        return torch.tensor(value, dtype=dtype, device=device)
    if not isinstance(value, tuple):
        return torch.full((), value, dtype=dtype, device=device)
    return torch.ops.vps.numbers.default(list(value), dtype, device)


def fill(values: list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` as a tensor ``[n]``, without a copy from the host: no graph could capture it."""
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])


# An operator, so that a traced graph makes equal vectors once (vps.backends.sharing).
numbers = torch.library.custom_op(
    "vps::numbers",
    fill,
    mutates_args=(),
    schema="(float[] values, ScalarType dtype, Device device) -> Tensor",
)


@numbers.register_fake
def _fake(values: list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(len(values), dtype=dtype, device=device)


@kept
def tie_breakers(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(offsets, factors)``, float64 ``[width]``, such that ``offsets + factors · scores`` orders
    float32 scores as they are, and equal ones by the lower index.

    Unequal scores differ by 2⁻²⁴ of their value or more, the factors by less than 2⁻³⁰ for widths
    up to 2²²; the offsets, beyond the reach of float32, order zeros.
    """
    index = torch.arange(width, dtype=torch.float64, device=device)
    return (width - index) * 2.0**-400, 1 - index * 2.0**-52
