"""Input selections shared by the layers that read the same x: q, k and v, or gate and up.

One selection is remembered per thread, that of the last x, by weak references and versions: it is
found again only for the very same, unchanged tensors.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

# Of x and of its mask, the state of both then, the grouping, and the indices I_in [G, r]. A plain
# tuple, since layers make and read one at each call.
_Selection = tuple[
    weakref.ref[Tensor], weakref.ref[Tensor] | None, tuple[int, ...], tuple[int, ...], Tensor
]


class _Last(threading.local):
    """The last selection of the thread."""

    selection: _Selection | None = None


_LAST = _Last()


def find(x: Tensor, mask: Tensor | None, shape: tuple[int, ...], r: int) -> Tensor | None:
    """Indices ``[G, r]`` remembered for this x and mask, grouped as ``shape``; or ``None``."""
    if torch.compiler.is_compiling():
        return None
    last = _LAST.selection
    if last is None:
        return None
    of_x, of_mask, state, of_shape, I_in = last
    if of_x() is not x or of_shape != shape:
        return None
    if (None if of_mask is None else of_mask()) is not mask or _state(x, mask) != state:
        return None
    width = I_in.shape[1]
    return None if width < r else I_in if width == r else I_in[:, :r]


def remember(x: Tensor, mask: Tensor | None, shape: tuple[int, ...], I_in: Tensor) -> None:
    """Keep the indices ``[G, r]`` selected for x and mask until another x comes or x is freed."""
    state = _state(x, mask)
    if state is not None:
        of_mask = None if mask is None else weakref.ref(mask, _forget)
        _LAST.selection = weakref.ref(x, _forget), of_mask, state, shape, I_in


def forget() -> None:
    """Drop what this thread remembers."""
    _LAST.selection = None


def _state(x: Tensor, mask: Tensor | None) -> tuple[int, ...] | None:
    """Versions of both and the stream on which a selection is ready; ``None`` where a change would
    not show, here or wherever this call runs again.

    Inference tensors count no versions. A compiled or captured call is replayed with other values,
    and the tensors of a functional transform (``vmap``) die with it.
    """
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if transformed or torch.compiler.is_compiling() or x.is_inference():
        return None
    stream = 0
    if x.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(x.device).cuda_stream
    if mask is None:
        return x._version, stream
    return None if mask.is_inference() else (x._version, stream, mask._version)


def _forget(reference: weakref.ref[Tensor]) -> None:
    """Drop the selection with its x or mask, on the thread that frees it."""
    last = _LAST.selection
    if last is not None and any(reference is own for own in last[:2]):
        forget()
