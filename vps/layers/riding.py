"""W through a layer's own forward: one-hot rows ride along with x (SPEC §4, identity 5).

A linear layer applied to the one-hot row of feature j is column j of W, plus the bias. So the
selected columns come out of the very product that W is read for; nothing else of W is needed but
the norms of the selected rows, or the rows themselves for SC and the spectral clip.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vps.algorithm import tracing
from vps.algorithm.policy import Settings
from vps.algorithm.selection import accumulation_dtype, is_read_freely
from vps.algorithm.weight import (
    MatrixProjection,
    Projection,
    Weight,
    gather,
    needs_gram_of_columns,
    needs_gram_of_rows,
)
from vps.algorithm.weight import Products as Numbers

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
        module: the layer in the model.
    """

    d_in: int
    d_out: int
    offset: bool
    module: nn.Module

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


class ForwardWeight(Weight):
    """W of a layer that is known by its forward alone, for one call.

    Args:
        base: the layer.
        trains: whether a parameter of the layer asks for a gradient.
        autocast: what autocast casts to where it is on, or ``None``.
    """

    def __init__(self, base: Base, trains: bool, autocast: torch.dtype | None = None) -> None:
        self.base, self.trains, self.autocast = base, trains, autocast

    @property
    def widths(self) -> tuple[int, int]:
        return self.base.d_out, self.base.d_in

    def parameters(self) -> Iterable[Tensor]:
        return self.base.module.parameters()

    def cast(self, dtype: torch.dtype) -> ForwardWeight:
        return ForwardWeight(self.base, self.trains, dtype)

    def release(self) -> None:
        self.base.release()

    def project(self, x: Tensor, bias: Tensor | None, I_in: Tensor, H: Tensor | None = None) -> Any:
        with self._as_outside(x):
            if tracing.is_transforming() or torch.jit.is_tracing():
                return self._through_matrix(x, I_in)
            chosen = riders(I_in, self.base.d_in)
            products = ride(self.base, x.reshape(-1, x.shape[-1]), chosen.features)
        return ForwardProjection(self, x, products, chosen, I_in)

    def _as_outside(self, x: Tensor) -> AbstractContextManager[Any]:
        """Return autocast as it is where the layer is called."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(x.device.type, dtype=self.autocast)

    def _through_matrix(self, x: Tensor, I_in: Tensor) -> Projection:
        """Return the projection inside a transform of ``torch.func`` or a trace, where no backward
        pass can be asked for rows of W: all of W is read by one-hot rows."""
        base = self.base
        rows = x.reshape(-1, base.d_in)
        output = base.product(rows)
        offset = None
        if base.offset:
            zeros = torch.zeros(1, base.d_in, dtype=x.dtype, device=x.device)
            offset = base.steady_product(zeros)[0]
        every = torch.arange(base.d_in, device=x.device)
        W = columns(base, every, x.dtype, offset).detach().t()
        return _InTransform(x, W, output.view(*x.shape[:-1], -1), offset, base.bias(), I_in)


class _InTransform(MatrixProjection):
    """Tokens through a layer whose whole W was read, with the output of the layer itself."""

    def __init__(
        self,
        x: Tensor,
        W: Tensor,
        output: Tensor,
        offset: Tensor | None,
        bias: Tensor | None,
        I_in: Tensor,
    ) -> None:
        super().__init__(x, W, bias, F.linear(x, W), I_in)
        self.output = output

    def base(self) -> Tensor:
        return self.output if self.b is None else self.output + self.b


class ForwardProjection(Projection):
    """Tokens through a layer known by its forward, with the columns that rode along.

    Args:
        weight: of the layer.
        x: ``[G, T, d_in]``.
        products: what the call of the layer gave.
        chosen: the riders.
        I_in: ``[G, r]``.
    """

    def __init__(
        self, weight: ForwardWeight, x: Tensor, products: Products, chosen: Riders, I_in: Tensor
    ) -> None:
        self.weight, self.x, self.ridden, self.I_in = weight, x, products, I_in
        self.H = products.H.view(*x.shape[:2], -1)
        self.output = products.output[: len(products.H)].view_as(self.H)
        self.table, self.place = products.table, chosen.place
        self.known = Columns(chosen.features, products.table)

    def base(self) -> Tensor:
        bias = self.bias()
        return self.output if bias is None else self.output + bias

    def bias(self) -> Tensor | None:
        return self.weight.base.bias()

    def selected(self, I_out: Tensor) -> Tensor:
        H, ridden = self.H, self.ridden
        if self.weight.trains and torch.is_grad_enabled() and ridden.output.requires_grad:
            H = _through_input(ridden).view_as(H)
        return gather(H, I_out)

    def expand(self, u: Tensor) -> Tensor:
        return expand(u, self.table, self.place)

    def products(self, I_out: Tensor, settings: Settings) -> Numbers:
        dtype, table, place = accumulation_dtype(self.table.dtype), self.table, self.place
        base = self.weight.base
        norm_A = gram_A = norm_B = gram_B = crossing = None
        if needs_gram_of_rows(settings):
            gram_A = self._gram_of_rows(I_out, dtype)
        elif settings.tau is not None:
            norm_A = base.row_norms(I_out, dtype, self.known)
        if needs_gram_of_columns(settings):
            gram_B = _gram(table.to(dtype), place)
        elif settings.tau is not None:
            norm_B = torch.linalg.vector_norm(table, 2, dim=1, dtype=dtype)[place]
        if settings.second_order:
            crossing = table[place.unsqueeze(1), I_out.unsqueeze(2)].to(dtype)
        X_A = gather(self.x.detach(), self.I_in) if settings.coupled else None
        t = gather(self.H.detach(), I_out)
        return Numbers(t, X_A, norm_A, gram_A, norm_B, gram_B, crossing)

    def _gram_of_rows(self, I_out: Tensor, dtype: torch.dtype) -> Tensor:
        if len(I_out) > 1 and is_read_freely(I_out):
            index, place = torch.unique(I_out, return_inverse=True)
        else:
            index = I_out.reshape(-1)
            place = torch.arange(len(index), device=index.device).view(I_out.shape)
        return _gram(self.weight.base.rows(index, self.known).to(dtype), place)


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


def _through_input(products: Products) -> Tensor:
    """Return H of the tokens whose gradient reaches x alone: W is a constant in the update."""
    if not products.rows.requires_grad:
        return products.H.detach()
    output: Tensor = _ThroughInput.apply(products.rows, [products.output])
    H = output[: len(products.H)]
    return H if products.offset is None else H - products.offset


class _ThroughInput(torch.autograd.Function):
    """The output of a layer as a function of its input alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, output: list[Tensor]) -> Tensor:
        ctx.graph = rows, output[0]
        return output[0].detach().clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None]:
        return _Transposed.apply(g, ctx.graph), None


class _Transposed(torch.autograd.Function):
    """``g W`` of a layer as a function of g alone: W is a constant of the update (SPEC §6)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, graph: tuple[Tensor, Tensor]) -> Tensor:
        ctx.graph = graph
        rows, output = graph
        return torch.autograd.grad(output, rows, g, retain_graph=True)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
        rows, output = ctx.graph
        with torch.enable_grad():
            g = torch.zeros_like(output).requires_grad_()
            (product,) = torch.autograd.grad(output, rows, g, create_graph=True)
        return torch.autograd.grad(product, g, v)[0], None
