"""Sums of |values| over many tokens on a CPU, by blocks of tokens.

Three things cost more than the sums themselves. Memory that has left the caches is slow, so
|values| is made a block at a time. Fresh memory comes from the system page by page, so that of a
block is kept for the length of a patched model's forward pass; nothing is kept outside one. And
what one core wrote is slow to read from another, so each thread sums the rows it wrote.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from vps import masking
from vps.backends import threads

BLOCK = 2**20 if threads.ASLEEP else 2**19  # elements; each block wakes the threads twice
SMALL = 2**15  # elements, for which memory is at hand anyway


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.views: dict[tuple[torch.Size, torch.dtype], Tensor] = {}


_KEPT = _Kept()


def of_absolute(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of |values| ``[T, d]`` over T, ``[d]`` in ``dtype``."""
    tokens, width = values.shape
    workers = torch.get_num_threads()
    parts = values.view(workers if tokens % workers == 0 else 1, -1, width)
    blocks = -(-values.numel() // BLOCK)
    sums = [
        torch.abs(block, out=_memory_like(block)).sum(1, dtype=dtype)
        for block in ([parts] if blocks <= 1 else parts.split(-(-parts.shape[1] // blocks), 1))
    ]
    return (sums[0] if len(sums) == 1 else torch.cat(sums)).sum(0)


def release() -> None:
    """Free the memory of this thread, unless a patched model still runs on it."""
    if not _a_model_runs():
        _KEPT.buffer = None
        _KEPT.views.clear()


def _memory_like(block: Tensor) -> Tensor:
    """Memory of the shape and dtype of ``block`` ``[parts, n, d]``, good until the next call; each
    part lies where the same part of other blocks does.
    """
    key = block.shape, block.dtype
    found = _KEPT.views.get(key)
    if found is not None:
        return found
    (parts, n, width), dtype = key
    room = BLOCK // parts
    if block.numel() < SMALL or n * width > room or not _a_model_runs():
        return torch.empty(key[0], dtype=dtype)
    if _KEPT.buffer is None or _KEPT.buffer.dtype != dtype:
        _KEPT.views.clear()
        _KEPT.buffer = torch.empty(BLOCK, dtype=dtype)
    found = _KEPT.views[key] = _KEPT.buffer.as_strided(key[0], (room, width, 1))
    return found


def _a_model_runs() -> bool:
    return any(layout.owner is not None for layout in masking.STATE.layouts)
