"""Make small constant tensors and settled choices once.

An operation between a tensor and a Python number first makes a tensor of the number. For small
tensors that costs as much as the operation itself.
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


_MODES = torch._C._TorchDispatchModeKey
_TRACERS = _MODES.FAKE, _MODES.PROXY, _MODES.FUNCTIONAL


def is_kept() -> bool:
    """Return whether a tensor made now may serve later calls.

    Those made under a compiler, or a mode that traces such as FakeTensorMode, belong to it alone.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() == 0:
        return True
    return all(torch._C._get_dispatch_mode(mode) is None for mode in _TRACERS)


@contextmanager
def apart() -> Iterator[None]:
    """Make tensors that serve every later call: outside of inference mode, vmap and traces.

    ``torch.jit.trace`` finds them as constants later.
    """
    state = torch._C._get_tracing_state()
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        if state is None:  # no trace runs, and the state may not be set
            yield
            return
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def stream_of(tensor: Tensor) -> int | None:
    """Return the current stream of a tensor's GPU, on which what is made of it is ready."""
    if not tensor.is_cuda:
        return None
    return torch.cuda.current_stream(tensor.device).cuda_stream


def kept(function: F) -> F:
    """Keep the results of ``function`` by arguments, except where :func:`is_kept` says no."""

    @lru_cache(maxsize=4096)
    def keep(*arguments: Any) -> Any:
        with apart():
            return function(*arguments)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        return keep(*arguments) if is_kept() else function(*arguments)

    return call  # type: ignore[return-value]


def constant(value: Value, like: Tensor) -> Tensor:
    """Return ``value`` in the dtype and on the device of ``like``; never write to it."""
    return vector(value, like.dtype, like.device)


@kept
def vector(value: Value, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``value`` as a tensor without dims or ``[n]``; never write to it."""
    if not torch.compiler.is_compiling():
        return torch.tensor(value, dtype=dtype, device=device)
    if not isinstance(value, tuple):
        return torch.full((), value, dtype=dtype, device=device)
    return torch.ops.vps.numbers.default(list(value), dtype, device)


def fill(values: list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``values`` as a tensor ``[n]``, without the copy from the host that graphs refuse."""
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])


# As an operator, so that a traced graph makes equal vectors once (vps.backends.sharing).
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
    """Return float64 ``offsets`` and ``factors`` ``[width]`` that break ties of float32 scores.

    ``offsets + factors · scores`` orders unequal scores as they are, and equal scores by the lower
    index. Unequal scores differ by at least 2⁻²⁴ of their value, and the factors by less than 2⁻³⁰
    for widths up to 2²²; the offsets, smaller than any float32, order zeros.
    """
    index = torch.arange(width, dtype=torch.float64, device=device)
    return (width - index) * 2.0**-400, 1 - index * 2.0**-52
