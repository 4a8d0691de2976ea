"""Memory for |values| on a CPU, kept for the length of a patched model's forward pass.

Fresh memory of some megabytes comes from the system page by page, which takes longer than writing
to it does. Nothing is kept outside a patched model.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from vps import masking

ELEMENTS = 2**20  # the most that is kept


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.views: dict[tuple[torch.Size, torch.dtype], Tensor] = {}


_KEPT = _Kept()


def like(values: Tensor) -> Tensor:
    """Memory of the shape and dtype of ``values``, of which nothing is left after the next call."""
    key = values.shape, values.dtype
    found = _KEPT.views.get(key)
    if found is None:
        size = values.numel()
        if size > ELEMENTS or not _a_model_runs():
            return torch.empty(key[0], dtype=key[1])
        buffer = _KEPT.buffer
        if buffer is None or buffer.dtype != key[1]:
            _KEPT.views.clear()
            buffer = _KEPT.buffer = torch.empty(ELEMENTS, dtype=key[1])
        found = _KEPT.views[key] = buffer[:size].view(key[0])
    return found


def release() -> None:
    """Free the memory of this thread, unless a patched model still runs on it."""
    if not _a_model_runs():
        _KEPT.buffer = None
        _KEPT.views.clear()


def _a_model_runs() -> bool:
    return any(layout.owner is not None for layout in masking.STATE.layouts)
