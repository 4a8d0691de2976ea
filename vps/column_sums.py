"""Sums of |values| over many tokens on a CPU.

Two things cost more than the sums themselves. Fresh memory comes from the system page by page, so
that for |values| is kept for the length of a patched model's forward pass; nothing is kept outside
one. And what one core wrote is slow to read from another, so each thread sums the rows it wrote.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from vps import masking

KEPT = 2**20  # the most elements that are kept


class _Room(NamedTuple):
    """Memory for |values|.

    Args:
        rows: ``[T, d]``.
        parts: the same as ``[threads, T / threads, d]``, or ``None`` where that is not whole.
    """

    rows: Tensor
    parts: Tensor | None


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.rooms: dict[tuple[torch.Size, torch.dtype, int], _Room] = {}


_KEPT = _Kept()


def of_absolute(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of |values| ``[T, d]`` over T, ``[d]`` in ``dtype``."""
    rows, parts = _room_for(values)
    torch.abs(values, out=rows)
    return (rows if parts is None else parts.sum(1, dtype=dtype)).sum(0, dtype=dtype)


def release() -> None:
    """Free the memory of this thread, unless a patched model still runs on it."""
    if not _a_model_runs():
        _KEPT.buffer = None
        _KEPT.rooms.clear()


def _room_for(values: Tensor) -> _Room:
    """Good until the next call."""
    key = values.shape, values.dtype, torch.get_num_threads()
    found = _KEPT.rooms.get(key)
    if found is not None:
        return found
    size = values.numel()
    if size > KEPT or not _a_model_runs():
        return _room(values.new_empty(size), *key)
    if _KEPT.buffer is None or _KEPT.buffer.dtype != values.dtype:
        _KEPT.rooms.clear()
        _KEPT.buffer = values.new_empty(KEPT)
    found = _KEPT.rooms[key] = _room(_KEPT.buffer[:size], *key)
    return found


def _room(memory: Tensor, shape: torch.Size, dtype: torch.dtype, threads: int) -> _Room:
    tokens, width = shape
    whole = threads > 1 and tokens % threads == 0
    return _Room(memory.view(shape), memory.view(threads, -1, width) if whole else None)


def _a_model_runs() -> bool:
    return any(layout.owner is not None for layout in masking.STATE.layouts)
