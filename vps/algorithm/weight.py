"""What the core of an update asks of W at the selected rows and columns (SPEC §4).

Norms, Gram matrices and the entries where they cross: read from a matrix in memory here, found
through a layer's own forward in :mod:`vps.layers.riding`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vps.algorithm.selection import accumulation_dtype


class Weight(Protocol):
    """W as the core sees it, for G groups of r selected inputs; all in the accumulation dtype."""

    def norm_in(self) -> Tensor:
        """``‖W[:, I_in]‖`` of each column, ``[G, r]``."""

    def norm_out(self, I_out: Tensor) -> Tensor:
        """``‖W[I_out]‖`` of each row, ``[G, r]``."""

    def gram_in(self) -> Tensor:
        """Inner products of the columns I_in, ``[G, r, r]``."""

    def gram_out(self, I_out: Tensor) -> Tensor:
        """Inner products of the rows I_out, ``[G, r, r]``."""

    def crossing(self, I_out: Tensor) -> Tensor:
        """``W[I_out, I_in]``, ``[G, r, r]``."""


class WeightMatrix:
    """W in memory.

    Args:
        W: ``[d_out, d_in]``.
        I_in: ``[G, r]``.
        B: the columns I_in, ``[d_out, G, r]``, or ``None`` to read all of W instead.
    """

    def __init__(self, W: Tensor, I_in: Tensor, B: Tensor | None) -> None:
        self.W, self.I_in, self.B = W, I_in, B
        self.dtype = accumulation_dtype(W.dtype)

    def norm_in(self) -> Tensor:
        norm = torch.linalg.vector_norm
        if self.B is not None:
            return norm(self.B, 2, dim=0, dtype=self.dtype)
        return norm(self.W, 2, dim=0, dtype=self.dtype)[self.I_in]

    def norm_out(self, I_out: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm
        if self.B is None:
            return norm(self.W, 2, dim=1, dtype=self.dtype)[I_out]
        rows = self.W.index_select(0, I_out.reshape(-1))
        return norm(rows, 2, dim=1, dtype=self.dtype).view(I_out.shape)

    def gram_in(self) -> Tensor:
        B = self.W[:, self.I_in] if self.B is None else self.B
        B = B.to(self.dtype)
        return torch.einsum("ogc,oge->gce", B, B)

    def gram_out(self, I_out: Tensor) -> Tensor:
        rows = self.W[I_out].to(self.dtype)
        return rows @ rows.mT

    def crossing(self, I_out: Tensor) -> Tensor:
        return self.W[I_out.unsqueeze(2), self.I_in.unsqueeze(1)].to(self.dtype)
