"""Find rows of W, and their norms, for a layer that is known by its forward alone (SPEC §4).

Rows come from the layer's backward pass, ``W[o] = ∂(x Wᵀ)[o] / ∂x``, which is right whatever an
adapter does meanwhile. A layer without a backward pass is applied to the identity, which costs d_in
rows a call. Where every matrix of a layer is quantized the norms are found once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vps.algorithm.selection import accumulation_dtype, is_read_freely
from vps.layers.riding import RIDERS, Columns, columns, one_hot

if TYPE_CHECKING:
    from vps.layers.own_forward import OwnForward

AGREEMENT = 0.02  # relative: quantized kernels round forward and backward differently


class NoBackward(RuntimeError):
    """A layer gives no gradient of its input."""


def find(base: OwnForward, index: Tensor, known: Columns) -> Tensor:
    """Return ``W[index]`` ``[K, d_in]`` for ``index`` ``[K]``.

    An adapter around a layer without a backward pass has an incomplete one, which the ``known``
    columns show.
    """
    try:
        rows = by_gradient(base, index)
    except NoBackward:
        return by_identity(base, index)
    if is_read_freely(rows) and not agree(rows, index, known):
        return by_identity(base, index)
    return rows


def by_gradient(base: OwnForward, index: Tensor) -> Tensor:
    """Return rows from the backward pass.

    Raises:
        NoBackward: the layer has no backward pass.
    """
    blocks = []
    with torch.inference_mode(False), torch.enable_grad(), _apart():
        for block in index.clone().split(RIDERS):
            start = torch.zeros(
                len(block), base.d_in, dtype=base.like.dtype, device=base.like.device
            ).requires_grad_()
            try:
                output = base.gradient_product(start)
                chosen = one_hot(block, base.d_out, output.dtype)
                blocks.append(torch.autograd.grad(output, start, chosen)[0])
            except (RuntimeError, NotImplementedError) as error:
                raise NoBackward(str(error).split("\n")[0]) from error
    return torch.cat(blocks)


def _apart() -> AbstractContextManager[Any]:
    """Hide the tensors that our own graph saves from a checkpoint around the layer."""
    if torch.compiler.is_compiling():  # the graph breaks at this backward pass
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def by_identity(base: OwnForward, index: Tensor) -> Tensor:
    """Return rows from the layer applied to every one-hot row, in blocks."""
    parts = [part.index_select(1, index) for part in _all_columns(base)]
    return torch.cat(parts).mT.contiguous()


def agree(rows: Tensor, index: Tensor, known: Columns) -> bool:
    """Return whether rows ``[K, d_in]`` of these outputs have the entries of known columns."""
    expected = known.table.index_select(1, index).mT.to(rows.dtype)
    error = rows.index_select(1, known.features) - expected
    return bool(error.norm() <= AGREEMENT * expected.norm())


class RowNorms:
    """Norms of all rows of W, found once by applying the layer to the identity, in blocks.

    They are found again when a parameter or buffer of the layer is replaced or changed.
    """

    def __init__(self) -> None:
        self._norms: Tensor | None = None
        self._key: list[tuple[Any, int]] = []

    def find(self, base: OwnForward, dtype: torch.dtype) -> Tensor:
        """Return the norms ``[d_out]`` in ``dtype``."""
        if self._norms is None or not (torch.compiler.is_compiling() or self._is_of(base.module)):
            total: Any = 0
            wide = accumulation_dtype(base.like.dtype)
            with torch.inference_mode(False):
                for part in _all_columns(base):
                    total = total + part.to(wide).square().sum(0)
                self._norms = total.sqrt()
            self._key = _versions(base.module)
        norms = self._norms
        if norms.device != base.like.device:
            norms = self._norms = norms.to(base.like.device)
        return norms.to(dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"_norms": None, "_key": []}  # weak references are neither copied nor pickled

    def _is_of(self, module: nn.Module) -> bool:
        now = _versions(module)
        return len(now) == len(self._key) and all(
            one() is other() and version == other_version
            for (one, version), (other, other_version) in zip(now, self._key, strict=True)
        )


def are_fixed(module: nn.Module) -> bool:
    """Return whether every matrix of a layer is quantized, so that its row norms may be kept.

    Nobody edits quantized data in place, while an edit of a plain ``weight.data`` stays unseen.
    """
    return not any(
        type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.dim() > 1
        for parameter in module.parameters()
    )


def _all_columns(base: OwnForward) -> Iterator[Tensor]:
    """Yield all columns of W in their order, in blocks ``[≤ RIDERS, d_out]``."""
    offset = base.constant_row()
    for block in torch.arange(base.d_in, device=base.like.device).split(RIDERS):
        yield columns(base, block, base.like.dtype, offset)


def _versions(module: nn.Module) -> list[tuple[Any, int]]:
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:  # accelerate, which puts other parameters there at every call
        return [(weakref.ref(hook), 0)]
    return [
        (weakref.ref(tensor), 0 if tensor.is_inference() else tensor._version)
        for tensor in (*module.parameters(), *module.buffers())
    ]
