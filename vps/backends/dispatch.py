"""Which backend computes: asked with :func:`backends`, chosen with :func:`backend`.

Left alone, a layer takes the fastest that its tensors allow: on CUDA and ROCm ``triton``, on a CPU
``cpp`` where it is built, and ``torch`` for float64 and everywhere else. ``cuda``, which is
``triton`` with one token at a time decoded in a single launch, runs only where it is asked for. A
backend that was asked for runs or raises; nothing falls back in silence.

A layer that holds L-BFGS pairs, which only a refinement records, is computed by ``torch`` on every
device: no other backend but ``reference`` knows them, and asking for one there raises. So is a
layer whose weight is no plain matrix in memory; for it ``torch`` is the only backend.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from vps.backends import cpp, cuda
from vps.masking import STATE

NAMES = ("torch", "cpp", "triton", "cuda", "reference")
VARIABLE = "VPS_BACKEND"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_FROM_ENVIRONMENT = os.environ.get(VARIABLE) or None


def backends() -> dict[str, str | None]:
    """Backend names, each with ``None`` when it can run or the reason why it cannot."""
    return {name: _why_missing(name) for name in NAMES}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Let every VPS layer run inside, on this thread, compute with one backend.

    Stronger than the environment variable ``VPS_BACKEND``, which does the same for the process.

    Args:
        name: ``"torch"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend cannot run here; the message gives the reason. Raised by the
            layer where it cannot take the layer's tensors.
    """
    _check(name, "vps.backend")
    STATE.backends.append(name)
    try:
        yield
    finally:
        STATE.backends.pop()


def asked(x: Tensor) -> str | None:
    """The backend that was asked for, for a layer with input ``x``; ``None`` for the fastest.

    Raises:
        RuntimeError: it cannot run or cannot take x.
    """
    if STATE.backends:
        name = STATE.backends[-1]
    elif _FROM_ENVIRONMENT is None:
        return None
    else:
        name = _FROM_ENVIRONMENT
        _check(name, VARIABLE)
    if name == "torch":  # takes every input
        return name
    reason = _why_not(name, x.device.type, x.dtype)
    if reason is not None:
        raise RuntimeError(f"vps backend {name!r} cannot run this layer: {reason}")
    return name


def choose_with_memory() -> str:
    """The backend for a layer that holds L-BFGS pairs: torch, or the reference.

    Raises:
        RuntimeError: another backend was asked for.
    """
    name = STATE.backends[-1] if STATE.backends else _FROM_ENVIRONMENT or "torch"
    if name not in ("torch", "reference"):
        raise RuntimeError(
            f"vps backend {name!r} cannot run this layer: it holds L-BFGS pairs, which only "
            "'torch' and 'reference' compute; set lbfgs=False in the config to go without them"
        )
    return name


def choose_opaque() -> None:
    """Check that torch may compute a layer that is known by its forward alone.

    Raises:
        RuntimeError: another backend was asked for.
    """
    name = STATE.backends[-1] if STATE.backends else _FROM_ENVIRONMENT or "torch"
    if name != "torch":
        raise RuntimeError(
            f"vps backend {name!r} cannot run this layer: its weight is no plain matrix in memory, "
            "and such layers are computed by 'torch' alone"
        )


def fastest(device: str, dtype: torch.dtype) -> str:
    """The backend that a layer takes by itself."""
    names = ("triton", "torch") if device == "cuda" else ("cpp", "torch")
    return next(name for name in names if _why_not(name, device, dtype) is None)


def _check(name: str, origin: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{origin}: unknown backend {name!r}, expected one of {NAMES}")
    reason = _why_missing(name)
    if reason is not None:
        raise RuntimeError(f"{origin}: backend {name!r} cannot run here: {reason}")


def _why_missing(name: str) -> str | None:
    return _reasons()[name]


_why_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see selection


@cache
def _reasons() -> dict[str, str | None]:
    reasons: dict[str, str | None] = dict.fromkeys(NAMES)
    reasons["cuda"] = cuda.why_missing()
    reasons["cpp"] = cpp.why_missing()
    if find_spec("triton") is None:
        reasons["triton"] = "triton is not installed: pip install 'vps-kernels[gpu]'"
    elif not (torch.cuda.is_available() or INTERPRETED):
        reasons["triton"] = "no CUDA or ROCm device (TRITON_INTERPRET=1 runs it slowly on a CPU)"
    return reasons


def _why_not(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot take such an input, or ``None``."""
    if name == "cuda":
        if device != "cuda":
            return f"x is on {device!r}, expected 'cuda'"
    elif name == "triton":
        if device != "cuda" and not (INTERPRETED and device == "cpu"):
            return f"x is on {device!r}, expected 'cuda'"
    elif name == "cpp":
        if device != "cpu":
            return f"x is on {device!r}, expected 'cpu'"
    else:
        return None
    if dtype == torch.float64:
        return "x is float64, expected float32, bfloat16 or float16"
    return _why_missing(name)
