"""W through a layer's own forward: one-hot rows ride along with x (SPEC §4, identity 5).

A linear layer applied to the one-hot row of feature j is column j of W, plus the bias. So the
selected columns come out of the very product that W is read for; nothing else of W is needed but
the norms of the selected rows, or the rows themselves for SC and the spectral clip.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vps.algorithm.selection import accumulation_dtype, is_read_freely

RIDERS = 256  # rows that ride along; more go in calls of their own


class Columns(NamedTuple):
    """Some columns of W.

    Args:
        features: which they are, ``[D]``.
        table: ``[D, d_out]``.
    """

    features: Tensor
    table: Tensor


class Base(Protocol):
    """A linear layer that is known by its forward alone.

    Args:
        d_in, d_out: its features.
        offset: whether its product may carry a bias that only a row of zeros shows.
    """

    d_in: int
    d_out: int
    offset: bool

    def product(self, rows: Tensor) -> Tensor:
        """``rows Wᵀ``, ``[M, d_out]`` for ``[M, d_in]``, plus a constant row if ``offset``."""

    def bias(self) -> Tensor | None:
        """What the last product is without, ``[d_out]``, or ``None``."""

    def steady_product(self, rows: Tensor) -> Tensor:
        """The same without a gradient, and without the noise of dropout."""

    def release(self) -> None:
        """Let go of what the calls brought into memory."""

    def is_noisy(self) -> bool:
        """Whether dropout acts on the product."""

    def row_norms(self, index: Tensor, dtype: torch.dtype, known: Columns) -> Tensor:
        """``‖W[index]‖`` in a dtype, of the shape of ``index``; some columns are known."""

    def rows(self, index: Tensor, known: Columns) -> Tensor:
        """``W[index]``, ``[K, d_in]`` for ``[K]``; some columns are known."""


class Riders(NamedTuple):
    """Features whose columns of W are wanted, each once.

    Args:
        features: which they are, ``[D]``.
        place: where those of each group are among them, ``[G, r]``.
    """

    features: Tensor
    place: Tensor


def riders(I_in: Tensor, d_in: int) -> Riders:
    """The distinct features of ``I_in`` ``[G, r]``.

    Where a tensor's values cannot be read without waiting, features may come several times, or all
    ``d_in`` of them where that is fewer.
    """
    groups, r = I_in.shape
    if groups == 1:
        return Riders(I_in[0], torch.arange(r, device=I_in.device).unsqueeze(0))
    if is_read_freely(I_in):
        index, place = torch.unique(I_in, return_inverse=True)
        return Riders(index, place)
    if groups * r < d_in:
        return Riders(
            I_in.reshape(-1), torch.arange(groups * r, device=I_in.device).view(groups, r)
        )
    return Riders(torch.arange(d_in, device=I_in.device), I_in)


def one_hot(index: Tensor, d_in: int, dtype: torch.dtype) -> Tensor:
    """Rows ``[D, d_in]`` with a one at each index ``[D]``."""
    rows = torch.zeros(len(index), d_in, dtype=dtype, device=index.device)
    return rows.scatter_(1, index.unsqueeze(1), 1.0)


class Products(NamedTuple):
    """What one call of a layer gave.

    Args:
        rows: what it was given, ``[M, d_in]``, the tokens first.
        output: what came back, ``[M, d_out]``, with its graph.
        H: base product of the tokens, ``[N, d_out]``, with its graph.
        table: the riders' columns of W, ``[D, d_out]``, without a graph.
        offset: the constant that H is without, ``[d_out]``, or ``None``.
    """

    rows: Tensor
    output: Tensor
    H: Tensor
    table: Tensor
    offset: Tensor | None


def ride(base: Base, tokens: Tensor, index: Tensor) -> Products:
    """Apply ``base`` once to tokens ``[N, d_in]`` and to the one-hot rows of ``index`` ``[D]``.

    Raises:
        TypeError: the layer gave no tensor ``[M, d_out]``.
    """
    together = len(index) <= RIDERS and not base.is_noisy()
    parts = [tokens]
    if together:
        parts.append(one_hot(index, base.d_in, tokens.dtype))
    if base.offset:
        parts.append(tokens.new_zeros(1, base.d_in))
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    output = base.product(rows)
    check(output, len(rows), base.d_out)
    count = len(tokens)
    H, offset = output[:count], None
    if base.offset:
        offset = output[-1].detach()
        H = H - offset
    if together:
        table = output[count : count + len(index)].detach()
        table = table if offset is None else table - offset
    else:
        table = columns(base, index, tokens.dtype, offset)
    return Products(rows, output, H, table, offset)


def columns(base: Base, index: Tensor, dtype: torch.dtype, offset: Tensor | None) -> Tensor:
    """Columns of W ``[D, d_out]`` for ``index`` ``[D]``, in calls of :data:`RIDERS` rows."""
    blocks = []
    for block in index.split(RIDERS):
        part = base.steady_product(one_hot(block, base.d_in, dtype))
        check(part, len(block), base.d_out)
        blocks.append(part if offset is None else part - offset)
    return torch.cat(blocks)


def check(output: object, count: int, d_out: int) -> None:
    """Raise where a layer's output is not ``[count, d_out]``."""
    if not isinstance(output, Tensor) or output.shape != (count, d_out):
        came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"vps: a layer sharpened through its forward must give [{count}, {d_out}] for "
            f"{count} rows, got {came}"
        )


class RiddenWeight:
    """What the core asks of W (:class:`weight.Weight`), of a layer known by its forward.

    Args:
        base: the layer.
        known: the riders' columns.
        place: where those of each group are, ``[G, r]``.
    """

    def __init__(self, base: Base, known: Columns, place: Tensor) -> None:
        self.base, self.known, self.place = base, known, place
        self.table = known.table
        self.dtype = accumulation_dtype(known.table.dtype)

    def norm_in(self) -> Tensor:
        return torch.linalg.vector_norm(self.table, 2, dim=1, dtype=self.dtype)[self.place]

    def norm_out(self, I_out: Tensor) -> Tensor:
        return self.base.row_norms(I_out, self.dtype, self.known)

    def gram_in(self) -> Tensor:
        return _gram(self.table.to(self.dtype), self.place)

    def gram_out(self, I_out: Tensor) -> Tensor:
        if len(I_out) > 1 and is_read_freely(I_out):
            index, place = torch.unique(I_out, return_inverse=True)
        else:
            index = I_out.reshape(-1)
            place = torch.arange(len(index), device=index.device).view(I_out.shape)
        return _gram(self.base.rows(index, self.known).to(self.dtype), place)

    def crossing(self, I_out: Tensor) -> Tensor:
        return self.table[self.place.unsqueeze(1), I_out.unsqueeze(2)].to(self.dtype)


def _gram(vectors: Tensor, place: Tensor) -> Tensor:
    """Inner products ``[G, r, r]`` of the vectors ``[D, d]`` at ``place`` ``[G, r]``."""
    if place.numel() <= len(vectors):
        chosen = vectors[place]
        return chosen @ chosen.mT
    gram = vectors @ vectors.mT
    return gram[place.unsqueeze(2), place.unsqueeze(1)]


def expand(u: Tensor, table: Tensor, place: Tensor) -> Tensor:
    """``u Bᵀ``: ``[G, T, r]`` to ``[G, T, d_out]``, with B at ``place`` ``[G, r]`` of the table."""
    if place.numel() <= len(table):
        return u @ table[place]
    index = place.unsqueeze(1).expand_as(u)
    dense = u.new_zeros(*u.shape[:2], len(table)).scatter_add(-1, index, u)
    return dense @ table
