"""Input selections shared by the layers that read the same x: q, k and v, or gate and up.

One selection is remembered per thread, that of the last x, by weak references and versions: it is
found again only for the very same, unchanged tensors.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor


class _Last(threading.local):
    """The last selection: its sources, their versions, their grouping, and ``I_in``."""

    sources: tuple[weakref.ref[Tensor], ...] = ()
    versions: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    I_in: Tensor | None = None


_LAST = _Last()


def find(x: Tensor, mask: Tensor | None, shape: tuple[int, ...], r: int) -> Tensor | None:
    """Indices ``[G, r]`` remembered for this x and mask, grouped as ``shape``; or ``None``."""
    I_in, last = _LAST.I_in, _LAST.sources
    if I_in is None or last[0]() is not x or _LAST.shape != shape or I_in.shape[1] < r:
        return None
    if mask is None:
        if len(last) > 1:
            return None
        sources: tuple[Tensor, ...] = (x,)
    else:
        if len(last) == 1 or last[1]() is not mask:
            return None
        sources = (x, mask)
    if not _can_be_watched(sources) or _versions(sources) != _LAST.versions:
        return None
    return I_in if I_in.shape[1] == r else I_in[:, :r]


def remember(x: Tensor, mask: Tensor | None, shape: tuple[int, ...], I_in: Tensor) -> None:
    """Keep the indices ``[G, r]`` selected for x and mask until another x comes or x is freed."""
    sources = (x,) if mask is None else (x, mask)
    if _can_be_watched(sources):
        _LAST.sources = tuple(weakref.ref(source, _forget) for source in sources)
        _LAST.versions = _versions(sources)
        _LAST.shape = shape
        _LAST.I_in = I_in


def forget() -> None:
    """Drop what this thread remembers."""
    _LAST.I_in = None


def _versions(sources: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Their versions, and the stream on which a selection is ready."""
    x = sources[0]
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return stream, *(source._version for source in sources)


def _can_be_watched(sources: tuple[Tensor, ...]) -> bool:
    """Whether a change of these tensors shows, here and wherever this call runs again.

    Inference tensors count no versions. A compiled or captured call is replayed with other values.
    """
    if torch.compiler.is_compiling() or any(source.is_inference() for source in sources):
        return False
    return not (sources[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _forget(reference: weakref.ref[Tensor]) -> None:
    """Drop the selection with its x, on the thread that frees it."""
    if any(reference is source for source in _LAST.sources):
        forget()
