"""Choose the backend that computes: :func:`backends` lists them, :func:`backend` asks for one.

By default a layer takes the fastest backend for its tensors: ``triton`` on CUDA and ROCm, ``cpp``
on a CPU where it is built, and ``torch`` for float64 and everywhere else. ``cuda`` is ``triton``
with a single token decoded in one launch; it runs only if it is asked for. A backend that was asked
for runs or raises; nothing falls back in silence.

Inside transforms of ``torch.func`` torch computes, whichever backend was asked for but
``reference``: compiled operators know no such tensors.

Only ``torch`` and ``reference`` can compute a layer that holds L-BFGS pairs, and only ``torch`` a
layer whose weight is no plain matrix in memory. Asking for another backend there raises.

A compiled backend leaves to torch the later tokens of ``scope="prompt"`` that need δ itself, for a
clamp or where rounding ``x + e`` to 16 bits would show, or a gradient.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vps.algorithm import tracing
from vps.algorithm.flow import Given
from vps.backends import cpp, cuda, reference_backend, torch_backend, triton
from vps.backends.call import Call, Kind
from vps.masking import STATE, groups_of

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
    """Return backend names, each with ``None`` or the reason why it cannot run."""
    return {name: _why_missing(name) for name in BACKENDS}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Let every VPS layer run inside, on this thread, compute with one backend.

    It overrides the environment variable ``VPS_BACKEND``, which does the same for the process.

    Args:
        name: ``"torch"``, ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"reference"``.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend cannot run here; the message gives the reason. A layer raises it
            if the backend cannot take the layer's tensors.
    """
    _check(name, "vps.backend")
    STATE.backends.append(name)
    try:
        yield
    finally:
        STATE.backends.pop()


def asked(kind: Kind) -> ModuleType | None:
    """Return the backend that was asked for, or ``None`` if the fastest is to run.

    Raises:
        RuntimeError: the backend cannot run, or does not take calls of this kind.
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


def later(kind: Kind, given: Given, x: Tensor) -> tuple[Any, tuple[Tensor, ...]] | None:
    """Return a function of x ``[G, 1, d_in]``, W, b and more arguments, and these arguments.

    It computes a later token of a fixed update (SPEC §11). ``None`` where that is no single call.
    """
    if given.through is None or given.through.dtype is not x.dtype:
        return None
    find = getattr(asked(kind) or fastest(kind), "later", None)
    found: tuple[Any, tuple[Tensor, ...]] | None = None if find is None else find(given, x)
    return found


def takes_several(plan: Any, x: Tensor) -> bool:
    """Return whether the backend computes several layers of x ``[B, T, d_in]`` in one call.

    Triton does so for up to 16 tokens, each its own group.
    """
    if x.shape[0] * x.shape[1] > 16 or x.shape[1] > 1 and plan.config.scope != "token":
        return False
    if STATE.backends or FROM_ENVIRONMENT is not None:
        return (asked(plan.kind) or plan.backend) is triton
    return plan.backend is triton


def run_fixed(x: Tensor, plan: Any, given: Given) -> Tensor | None:
    """Return the output ``[..., d_out]`` of a single layer whose update a prompt has fixed."""
    grouped, sequences = x, given.I_in.shape[0]  # type: ignore[union-attr]
    rows = x.shape[0] if x.dim() > 2 else (STATE.layouts[-1].shape if STATE.layouts else (1,))[0]
    if x.dim() != 3 or x.shape[1] != 1:
        if rows == sequences and x.dim() != 3:
            grouped = x.reshape(sequences, -1, x.shape[-1])
        if groups_of(x, "sequence")[2] is not None:
            raise ValueError(
                "vps: scope='prompt' holds one decision for each row of a cache, got rows packed "
                "from several sequences; expected rows of one sequence"
            )
    if rows != sequences:
        raise ValueError(
            f"vps: the cache holds what {sequences} prompts decided, got a call of {rows} "
            "sequences; expected one for each"
        )
    if given.through is not None and given.through.dtype is not x.dtype:  # the model was converted
        given = given._replace(through=None, edit=None, readers=None)
    backend = plan.backend
    if STATE.backends or FROM_ENVIRONMENT is not None:
        backend = asked(plan.kind) or backend
    traced = torch.compiler.is_compiling()
    if backend is not reference_backend and (
        tracing.is_compiled_transform(traced)
        if traced
        else torch._C._functorch.peek_interpreter_stack() is not None
    ):
        backend = torch_backend
    tracing_now = traced or torch._C._is_tracing()
    call = Call(grouped, plan.layers, None, None, None, given, tracing_now, plan.config)
    y = backend.run(call)[0][0]
    return y if y is None or grouped is x else y.view(*x.shape[:-1], y.shape[-1])


def fastest(kind: Kind) -> ModuleType:
    """Return the backend for calls of a kind if none is asked for."""
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
