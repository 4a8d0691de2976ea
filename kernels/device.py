"""Launch where the tensors are, sum in a dtype that fits theirs, and note what was launched.

Triton takes the current device, whatever its arguments lie on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

P = ParamSpec("P")
T = TypeVar("T")


def on_its_device(
    launch: Callable[Concatenate[Tensor, P], T],
) -> Callable[Concatenate[Tensor, P], T]:
    """Make the device of the first tensor current for ``launch``: models lie on several."""

    @wraps(launch)
    def there(tensor: Tensor, *args: P.args, **kwargs: P.kwargs) -> T:
        with torch.cuda.device_of(tensor):
            return launch(tensor, *args, **kwargs)

    return there


def accumulation(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """Return the dtype of sums of ``dtype``, for torch and for Triton."""
    if dtype == torch.float64:
        return torch.float64, tl.float64
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.float32, tl.float32
    raise TypeError(f"vps kernels take float16, bfloat16, float32 and float64, got {dtype}")


@triton.jit
def wait_for_last_kernel(PDL: tl.constexpr, LETS_NEXT: tl.constexpr) -> None:
    """Wait until the kernel before has written all, then perhaps let the next one start.

    Before it a kernel reads nothing that its predecessor writes. The next one may read what was
    written before this one started.
    """
    if PDL:
        gdc_wait()
        if LETS_NEXT:
            gdc_launch_dependents()


class Launched(NamedTuple):
    """Hold what launches a compiled kernel again.

    Triton's own launch looks at each argument to find the compiled kernel.

    Args:
        start: takes a stream, then ``fixed``, then all arguments of the kernel: pointers, as
            integers, then ``rest``.
        fixed: the kernel's handle and what the launcher wants to know of it.
        rest: the arguments behind the pointers.
    """

    start: Callable[..., None]
    fixed: tuple[Any, ...]
    rest: tuple[Any, ...]


class _Noted(threading.local):
    launches: list[Launched] | None = None


_NOTED = _Noted()


def begin(
    kernel: Any,
    grid: tuple[int, ...],
    pointers: tuple[Any, ...],
    rest: tuple[Any, ...],
    tile: dict[str, int],
    early: bool = False,
) -> None:
    """Launch a kernel with its pointers and what its signature has behind them.

    Of ``tile`` it takes what is no argument of the kernel. ``early`` lets it start before the
    kernel before it ends, for which it waits by itself.
    """
    options: dict[str, Any] = {
        name: tile[name] for name in ("num_warps", "maxnreg") if name in tile
    }
    if early:
        options["launch_pdl"] = True
    compiled = kernel[grid](*pointers, *rest, **options, enable_fp_fusion=True)
    if _NOTED.launches is not None and compiled is not None:  # the interpreter compiles nothing
        again = partial(compiled.run, *(*grid, 1, 1)[:3])
        fixed = compiled.function, compiled.packed_metadata, None, None, None
        _NOTED.launches.append(Launched(again, fixed, rest))


def is_watched() -> bool:
    """Return whether a profiler hangs on every launch of Triton, and wants to hear of it."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if enter is None and leave is None:
        return False
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@contextmanager
def noted() -> Iterator[list[Launched]]:
    """Note what :func:`begin` launches on this thread."""
    launches: list[Launched] = []
    _NOTED.launches = launches
    try:
        yield launches
    finally:
        _NOTED.launches = None
