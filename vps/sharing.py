"""Input selections shared by the layers that read the same x: q, k and v, or gate and up.

One selection is remembered per thread, that of the last x, by weak references and versions: it is
found again only for the very same, unchanged tensors.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Selection:
    sources: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    shape: tuple[int, ...]
    I_in: Tensor


class _Last(threading.local):
    selection: _Selection | None = None


_LAST = _Last()


def find(x: Tensor, mask: Tensor | None, shape: tuple[int, ...], r: int) -> Tensor | None:
    """Indices ``[G, r]`` remembered for this x and mask, grouped as ``shape``; or ``None``."""
    last = _LAST.selection
    if last is None or last.shape != shape or last.I_in.shape[1] < r:
        return None
    sources = (x,) if mask is None else (x, mask)
    if len(sources) != len(last.sources) or not _can_be_watched(sources):
        return None
    for index, source in enumerate(sources):
        if last.versions[index] != source._version or last.sources[index]() is not source:
            return None
    return last.I_in[:, :r]


def remember(x: Tensor, mask: Tensor | None, shape: tuple[int, ...], I_in: Tensor) -> None:
    """Keep the indices ``[G, r]`` selected for x and mask until another x comes or x is freed."""
    sources = (x,) if mask is None else (x, mask)
    if _can_be_watched(sources):
        references = tuple(weakref.ref(source, _forget) for source in sources)
        versions = tuple(source._version for source in sources)
        _LAST.selection = _Selection(references, versions, shape, I_in)


def _can_be_watched(sources: tuple[Tensor, ...]) -> bool:
    """Whether a change of these tensors shows, here and wherever this call runs again.

    Inference tensors count no versions. A compiled or captured call is replayed with other values.
    """
    if torch.compiler.is_compiling() or any(source.is_inference() for source in sources):
        return False
    return not (sources[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _forget(reference: weakref.ref[Tensor]) -> None:
    """Drop the selection with its x, on the thread that frees it."""
    last = _LAST.selection
    if last is not None and any(reference is source for source in last.sources):
        _LAST.selection = None
