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
from types import ModuleType
from typing import Any

from vps.backends import cpp, cuda, reference_backend, torch_backend, triton
from vps.backends.call import Kind
from vps.masking import STATE

BACKENDS: dict[str, Any] = {
    "torch": torch_backend,
    "cpp": cpp,
    "triton": triton,
    "cuda": cuda,
    "reference": reference_backend,
}
VARIABLE = "VPS_BACKEND"
FROM_ENVIRONMENT = os.environ.get(VARIABLE) or None


def backends() -> dict[str, str | None]:
    """Backend names, each with ``None`` when it can run or the reason why it cannot."""
    return {name: _why_missing(name) for name in BACKENDS}


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


def asked(kind: Kind) -> ModuleType | None:
    """Return the backend that was asked for, for calls of a kind; ``None`` for the fastest.

    Raises:
        RuntimeError: it cannot run or does not take them.
    """
    if STATE.backends:
        name = STATE.backends[-1]
    elif FROM_ENVIRONMENT is None:
        return None
    else:
        name = FROM_ENVIRONMENT
        _check(name, VARIABLE)
    reason = why_not(name, kind)
    if reason is not None:
        raise RuntimeError(f"vps backend {name!r} cannot run this layer: {reason}")
    return BACKENDS[name]


def fastest(kind: Kind) -> ModuleType:
    """Return the backend that takes calls of a kind where none is asked for."""
    names = ("triton", "torch") if kind.device == "cuda" else ("cpp", "torch")
    return BACKENDS[next(name for name in names if why_not(name, kind) is None)]


def why_not(name: str, kind: Kind) -> str | None:
    """Return why a backend cannot run calls of a kind here, or ``None``."""
    return BACKENDS[name].why_not(kind) or _why_missing(name)


def _check(name: str, origin: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: unknown backend {name!r}, expected one of {tuple(BACKENDS)}")
    reason = _why_missing(name)
    if reason is not None:
        raise RuntimeError(f"{origin}: backend {name!r} cannot run here: {reason}")


def _why_missing(name: str) -> str | None:
    return _reasons()[name]


_why_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see selection


@cache
def _reasons() -> dict[str, str | None]:
    return {name: module.why_missing() for name, module in BACKENDS.items()}
