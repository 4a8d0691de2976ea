"""Sharpening of layers whose inputs are split over ranks, which add up their outputs.

As :mod:`torch_backend`, for an x and a ``W`` of which each rank holds some columns (SPEC §2–5).
What ranks exchange for G groups of T tokens: by one all-gather each rank's best r candidates
(``2 · G · r`` numbers); with the layer's own all-reduce of H the distinct columns ``B`` that were
selected, at most ``G · r`` rows of d_out; and by one more the norms of the rows of W, ``G · r``, or
their inner products, ``G · r²``, and for SC ``x[:, I_in]``, ``[G, T, r]``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vps.algorithm import gradient, selection, torch_backend
from vps.algorithm.policy import Settings
from vps.algorithm.products import Products, build_core, needs_gram_of_rows
from vps.layers.shards import sharding
from vps.layers.shards.sharding import Projection, Shard


class Columns(NamedTuple):
    """The selected columns of W, each once.

    Args:
        values: ``[U, d_out]``.
        place: which of them column c of ``B`` is, ``[G, r]``; ``None`` where that is c.
    """

    values: Tensor
    place: Tensor | None

    def expand(self, u: Tensor) -> Tensor:
        """``u Bᵀ``: ``[G, T, r]`` to ``[G, T, d_out]``."""
        if self.place is None:
            return u @ self.values
        dense = u.new_zeros(*u.shape[:2], len(self.values))
        return dense.scatter_add_(-1, self.place.unsqueeze(1).expand_as(u), u) @ self.values

    def contract(self, g: Tensor) -> Tensor:
        """``g B``: ``[G, T, d_out]`` to ``[G, T, r]``."""
        product = g @ self.values.mT
        if self.place is None:
            return product
        return product.gather(-1, self.place.unsqueeze(1).expand(-1, g.shape[1], -1))


class Result(NamedTuple):
    """The output ``[G, T, d_out]``, the same on every rank, and what the backward pass needs."""

    y: Tensor
    I_in: Tensor
    columns: Columns
    I_out: Tensor
    core: Tensor
    gamma: Tensor
    t: Tensor


@torch.no_grad()
def forward(
    x: Tensor,
    layer: Projection,
    mask: Tensor | None,
    I_in: Tensor | None,
    I_out: Tensor | None,
    entropy: Tensor | None,
) -> Result:
    """Policy, selection, core and update of one layer.

    Args:
        x: this rank's inputs, ``[G, T, held]``.
        layer: what this rank holds of it.
        mask: bool ``[G, T]``, True counts; ``None`` when all do.
        I_in, I_out: selected features ``[G, r]`` where they are known.
        entropy: ℋ in nats, one element, or ``None``.
    """
    settings, shard = layer.settings, layer.shard
    x, W = sharding.padded(x, -1), sharding.padded(layer.weight, -1)
    count = None if mask is None else mask.sum(1).clamp_(min=1)
    if I_in is None:
        scores, _ = selection.statistics(x, mask, count, False)
        index = selection.top_k(scores, min(settings.r, shard.size))
        best = scores.gather(1, index)
        (I_in,) = sharding.best_of_all(best, [index + shard.offset], settings.r, shard)
    H, columns = _reduced(F.linear(x, W), W, I_in, shard)
    s_out, energy = None, None
    if I_out is None or settings.adaptive:
        s_out, energy = selection.statistics(H, mask, count, settings.adaptive)
    if I_out is None:
        assert s_out is not None
        I_out = selection.top_k(s_out, settings.r)
    products = _products(x, W, H, columns, I_in, I_out, settings, shard)
    core, gamma, t = build_core(products, layer.numbers, energy, entropy, mask, settings)
    if settings.clamp is None:
        y = columns.expand(gradient.mix(t, core * gamma.view(-1, 1, 1))).add_(H)
    else:
        y = torch_backend.add(H, columns.expand(gradient.mix(t, core)), gamma, settings.clamp)
    if mask is not None:
        y = torch.where(mask.any(1)[:, None, None], y, H)
    if layer.bias is not None:
        y = y.add_(layer.bias)
    return Result(y, I_in, columns, I_out, core, gamma, t)


def _reduced(H: Tensor, W: Tensor, I_in: Tensor, shard: Shard) -> tuple[Tensor, Columns]:
    """``H`` ``[G, T, d_out]`` of all ranks from this rank's summand, with the columns I_in of W,
    which ride along as rows of the layer's own all-reduce.
    """
    place = None
    distinct = I_in[0]
    if len(I_in) > 1:
        distinct, place = torch.unique(I_in, return_inverse=True)
    local, held = shard.locate(distinct)
    own = W.index_select(1, local).masked_fill_(~held, 0.0).t()
    rows = torch.cat([H.flatten(0, 1), own])
    dist.all_reduce(rows, group=shard.group)
    product, values = rows.split([len(rows) - len(own), len(own)])
    return product.view(H.shape), Columns(values, place)


def _products(
    x: Tensor,
    W: Tensor,
    H: Tensor,
    columns: Columns,
    I_in: Tensor,
    I_out: Tensor,
    settings: Settings,
    shard: Shard,
) -> Products:
    """The numbers that the core is made of, the same on every rank."""
    dtype = selection.accumulation_dtype(W.dtype)
    squares_A = gram_A = norm_B = gram_B = B_selected = X_A = None
    if needs_gram_of_rows(settings):
        rows = W[I_out].to(dtype)
        gram_A = rows @ rows.mT
    elif settings.tau is not None:
        rows = W.index_select(0, I_out.reshape(-1))
        squares_A = torch.linalg.vector_norm(rows, 2, dim=1, dtype=dtype).square_()
        squares_A = squares_A.view(I_out.shape)
    if settings.coupled:
        local, held = shard.locate(I_in)
        X_A = torch_backend.selected(x, local).masked_fill_(~held.unsqueeze(1), 0.0)
    squares_A, gram_A, X_A = sharding.add_up([squares_A, gram_A, X_A], shard)
    B, place = columns.values, columns.place
    if settings.tau is not None and settings.spectral:
        gram_B = B.to(dtype) @ B.to(dtype).mT
        gram_B = gram_B[None] if place is None else gram_B[place.unsqueeze(2), place.unsqueeze(1)]
    elif settings.tau is not None:
        norm_B = torch.linalg.vector_norm(B, 2, dim=1, dtype=dtype)
        norm_B = norm_B[None] if place is None else norm_B[place]
    if settings.second_order:
        rows_of_B = torch.arange(len(B), device=B.device)[None] if place is None else place
        B_selected = B[rows_of_B.unsqueeze(1), I_out.unsqueeze(2)].to(dtype)
    return Products(
        torch_backend.selected(H, I_out),
        X_A,
        None if squares_A is None else squares_A.sqrt(),
        gram_A,
        norm_B,
        gram_B,
        B_selected,
    )


class Backward(torch.autograd.Function):
    """The output of :func:`forward` with its gradient; W, B and the selection are constants.

    Nothing is exchanged: ``∂L/∂y`` is the same on every rank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        result: Result,
        clamp: float | None,
    ) -> Tensor:
        ctx.clamp = clamp
        ctx.save_for_backward(
            x if weight.requires_grad else None, weight, *result.columns, *result[3:]
        )
        return result.y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, values, place, I_out, core, gamma, t = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _of_input(g, weight, Columns(values, place), I_out, core, gamma, t, ctx.clamp)
            if wanted[0]
            else None,
            gradient.of_weight(g, x) if wanted[1] else None,
            gradient.of_bias(g) if wanted[2] else None,
            None,
            None,
        )


def _of_input(
    g: Tensor,
    weight: Tensor,
    columns: Columns,
    I_out: Tensor,
    core: Tensor,
    gamma: Tensor,
    t: Tensor,
    clamp: float | None,
) -> Tensor:
    """``∂L/∂x`` of this rank's inputs, ``[G, T, held]``; as :func:`gradient.of_input`."""
    grad_delta = g
    if clamp is not None:
        grad_delta = g * (columns.expand(gradient.mix(t, core)).abs() <= clamp)
    grad_u = columns.contract(grad_delta) * gamma.to(g.dtype).view(-1, 1, 1)
    grad_t = gradient.mix(grad_u, core if core.shape[1] == 1 else core.mT)
    return g.scatter_add(-1, I_out.unsqueeze(1).expand_as(grad_t), grad_t) @ weight
