"""Read W through a layer's own forward: one-hot rows ride along with x (SPEC §4, identity 5).

A linear layer applied to the one-hot row of feature j gives column j of W, plus the bias. So the
call that computes H also gives the selected columns. Beside them the update needs the norms of the
selected rows, or the rows themselves for SC and the spectral clip.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vps.algorithm import tracing
from vps.algorithm.policy import Settings
from vps.algorithm.selection import accumulation_dtype, is_read_freely
from vps.algorithm.weight import (
    MatrixProjection,
    Products,
    Projection,
    Weight,
    gather,
    needs_gram_of_columns,
    needs_gram_of_rows,
)

if TYPE_CHECKING:
    from vps.layers.own_forward import OwnForward

RIDERS = 256  # as many rows ride along at most; more go in calls of their own


class Columns(NamedTuple):
    """Some columns of W.

    Args:
        features: their indices, ``[D]``.
        table: the columns, ``[D, d_out]``.
    """

    features: Tensor
    table: Tensor


class Riders(NamedTuple):
    """Features whose columns or rows of W are wanted.

    Args:
        features: their indices, ``[D]``.
        place: the position in ``features`` of each group's own, ``[G, r]``.
    """

    features: Tensor
    place: Tensor


def distinct(index: Tensor) -> Riders:
    """Return the distinct features of ``index`` ``[G, r]``.

    A feature may come several times where values cannot be read without waiting for the device.
    """
    if len(index) > 1 and is_read_freely(index):
        return Riders(*torch.unique(index, return_inverse=True))
    features = index.reshape(-1)
    return Riders(features, torch.arange(len(features), device=index.device).view(index.shape))


def riders(I_in: Tensor, d_in: int) -> Riders:
    """Return the distinct features of ``I_in`` ``[G, r]``, or all ``d_in`` if those are fewer."""
    if len(I_in) > 1 and I_in.numel() >= d_in and not is_read_freely(I_in):
        return Riders(torch.arange(d_in, device=I_in.device), I_in)
    return distinct(I_in)


def one_hot(index: Tensor, d_in: int, dtype: torch.dtype) -> Tensor:
    """Return rows ``[D, d_in]`` with a one at each index ``[D]``."""
    rows = torch.zeros(len(index), d_in, dtype=dtype, device=index.device)
    return rows.scatter_(1, index.unsqueeze(1), 1.0)


class Ride(NamedTuple):
    """What one call of a layer gave.

    Args:
        rows: the input of the call, ``[M, d_in]``, the tokens first.
        output: its output, ``[M, d_out]``, with its graph.
        H: base product of the tokens, ``[N, d_out]``, with its graph.
        table: the riders' columns of W, ``[D, d_out]``, without a graph.
        offset: the constant that was taken from H, ``[d_out]``, or ``None``.
    """

    rows: Tensor
    output: Tensor
    H: Tensor
    table: Tensor
    offset: Tensor | None


def ride(base: OwnForward, tokens: Tensor, index: Tensor) -> Ride:
    """Apply ``base`` once to tokens ``[N, d_in]`` and to the one-hot rows of ``index`` ``[D]``.

    Raises:
        TypeError: the layer did not return a tensor ``[M, d_out]``.
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
    return Ride(rows, output, H, table, offset)


def columns(base: OwnForward, index: Tensor, dtype: torch.dtype, offset: Tensor | None) -> Tensor:
    """Return columns of W ``[D, d_out]`` for ``index`` ``[D]``, in calls of :data:`RIDERS` rows."""
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
    """The weight of a layer that is known by its forward alone, for one call.

    Args:
        base: the layer.
        trains: whether a parameter of the layer requires a gradient.
        autocast: the dtype of autocast where it is on, or ``None``.
    """

    def __init__(self, base: OwnForward, trains: bool, autocast: torch.dtype | None = None) -> None:
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

    def plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        self.base.biased = True
        with self._as_outside(x):
            return self.base.product(x)

    def project(self, x: Tensor, bias: Tensor | None, I_in: Tensor, H: Tensor | None = None) -> Any:
        with self._as_outside(x):
            if tracing.is_transforming() or torch.jit.is_tracing():
                return self._through_matrix(x, I_in)
            chosen = riders(I_in, self.base.d_in)
            ridden = ride(self.base, x.reshape(-1, x.shape[-1]), chosen.features)
        return ForwardProjection(self, x, ridden, chosen, I_in)

    def _as_outside(self, x: Tensor) -> AbstractContextManager[Any]:
        """Return a context with the autocast of the caller."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(x.device.type, dtype=self.autocast)

    def _through_matrix(self, x: Tensor, I_in: Tensor) -> Projection:
        """Return the projection from all of W, read by one-hot rows.

        Inside a transform of ``torch.func`` or a trace no backward pass can give rows of W.
        """
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
    """Tokens through a layer whose whole W was read; the output is the layer's own."""

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
        weight: the weight of the layer.
        x: ``[G, T, d_in]``.
        ridden: what the call of the layer gave.
        chosen: the riders.
        I_in: ``[G, r]``.
    """

    def __init__(
        self, weight: ForwardWeight, x: Tensor, ridden: Ride, chosen: Riders, I_in: Tensor
    ) -> None:
        self.weight, self.x, self.ridden, self.I_in = weight, x, ridden, I_in
        self.H = ridden.H.view(*x.shape[:2], -1)
        self.output = ridden.output[: len(ridden.H)].view_as(self.H)
        self.table, self.place = ridden.table, chosen.place
        self.known = Columns(chosen.features, ridden.table)

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

    def products(self, I_out: Tensor, settings: Settings) -> Products:
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
        return Products(t, X_A, norm_A, gram_A, norm_B, gram_B, crossing)

    def rows(self, I_out: Tensor) -> Tensor | None:
        chosen = distinct(I_out)
        found = self.weight.base.rows_at_hand(chosen.features, self.known)
        return None if found is None else found[chosen.place]

    def _gram_of_rows(self, I_out: Tensor, dtype: torch.dtype) -> Tensor:
        chosen = distinct(I_out)
        return _gram(self.weight.base.rows(chosen.features, self.known).to(dtype), chosen.place)


def _gram(vectors: Tensor, place: Tensor) -> Tensor:
    """Return inner products ``[G, r, r]`` of the vectors ``[D, d]`` at ``place`` ``[G, r]``."""
    if place.numel() <= len(vectors):
        chosen = vectors[place]
        return chosen @ chosen.mT
    gram = vectors @ vectors.mT
    return gram[place.unsqueeze(2), place.unsqueeze(1)]


def expand(u: Tensor, table: Tensor, place: Tensor) -> Tensor:
    """Return ``u Bᵀ`` ``[G, T, d_out]`` for u ``[G, T, r]``, with B at ``place`` of the table."""
    if place.numel() <= len(table):
        return u @ table[place]
    index = place.unsqueeze(1).expand_as(u)
    dense = u.new_zeros(*u.shape[:2], len(table)).scatter_add(-1, index, u)
    return dense @ table


def _through_input(ride: Ride) -> Tensor:
    """Return H of the tokens, whose gradient reaches x alone: W is a constant in the update."""
    if not ride.rows.requires_grad:
        return ride.H.detach()
    output: Tensor = _ThroughInput.apply(ride.rows, [ride.output])
    H = output[: len(ride.H)]
    return H if ride.offset is None else H - ride.offset


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
