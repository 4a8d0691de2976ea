"""Compute with W split by columns: each rank holds some inputs, and outputs are summed.

Ranks exchange for G groups of T tokens (SPEC §2–§5):

- by one all-gather, each rank's best r candidates, ``2 · G · r`` numbers;
- by the layer's own all-reduce of H, also the distinct selected columns of W, at most ``G · r``
  rows of d_out numbers;
- by another all-reduce, norms of the selected rows of W, ``G · r``, or their inner products,
  ``G · r²``, and for SC ``x[:, I_in]``, ``[G, T, r]``;
- in the backward pass nothing, because ``∂L/∂y`` is the same on every rank.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vps.algorithm import selection
from vps.algorithm.policy import Settings
from vps.algorithm.weight import (
    Products,
    Projection,
    gather,
    needs_gram_of_columns,
    needs_gram_of_rows,
)
from vps.layers.shards import sharding
from vps.layers.shards.sharding import ShardWeight


class RowShard(ShardWeight):
    """This rank's columns of W.

    Args:
        W: ``[d_out, held]``.
        shard: how the inputs are split.
    """

    reads_whole_input = False

    @property
    def widths(self) -> tuple[int, int]:
        return self.W.shape[0], self.shard.bounds[-1]

    def check(self, x: Tensor) -> None:
        """Accept x, which the layer has checked as its part of the input."""

    def is_empty(self, x: Tensor) -> bool:
        return math.prod(x.shape[:-1]) == 0  # a rank may hold no feature

    def select_inputs(self, x: Tensor, mask: Tensor | None, r: int) -> Tensor:
        scores, _ = selection.counted_statistics(sharding.padded(x, -1), mask, False)
        index = selection.top_k(scores, min(r, self.shard.size))
        best = scores.gather(1, index)
        return sharding.best_of_all(best, [index + self.shard.offset], r, self.shard)[0]

    def project(
        self, x: Tensor, bias: Tensor | None, I_in: Tensor, H: Tensor | None = None
    ) -> RowProjection:
        return RowProjection(self, sharding.padded(x, -1), bias, I_in)


class RowProjection(Projection):
    """Tokens through this rank's columns of W, summed over the ranks.

    Args:
        weight: this rank's columns.
        x: this rank's inputs, ``[G, T, held]``.
        bias: ``[d_out]`` or ``None``.
        I_in: ``[G, r]``.
    """

    def __init__(self, weight: RowShard, x: Tensor, bias: Tensor | None, I_in: Tensor) -> None:
        self.x, self.b, self.I_in, self.shard = x, bias, I_in, weight.shard
        self.W = sharding.padded(weight.W, -1)
        self.frozen = self.W.detach()
        own = F.linear(x, self.W)
        self.total = self._added_up(own.detach())
        self.H = self.output = sharding.reduced(own, self.total, self.shard)

    def _added_up(self, own: Tensor) -> Tensor:
        """Return H of all ranks, and keep the distinct columns I_in of W as ``values``.

        The columns ``[U, d_out]`` ride along as rows of the layer's own all-reduce. ``place``
        ``[G, r]`` is the row of ``values`` that holds column c of ``B``, or ``None`` where it is c.
        """
        self.place, distinct = None, self.I_in[0]
        if len(self.I_in) > 1:
            distinct, self.place = torch.unique(self.I_in, return_inverse=True)
        local, held = self.shard.locate(distinct)
        columns = self.frozen.index_select(1, local).masked_fill_(~held, 0.0).t()
        rows = torch.cat([own.flatten(0, 1), columns])
        dist.all_reduce(rows, group=self.shard.group)
        total, self.values = rows.split([len(rows) - len(columns), len(columns)])
        return total.view(own.shape)

    def base(self) -> Tensor:
        return self.H if self.b is None else self.H + self.b

    def bias(self) -> Tensor | None:
        return self.b

    def selected(self, I_out: Tensor) -> Tensor:
        H = self.H
        if self.W.requires_grad and torch.is_grad_enabled():
            H = sharding.reduced(F.linear(self.x, self.frozen), self.total, self.shard)
        return gather(H, I_out)

    def expand(self, u: Tensor) -> Tensor:
        if self.place is None:
            return u @ self.values
        dense = u.new_zeros(*u.shape[:2], len(self.values))
        return dense.scatter_add(-1, self.place.unsqueeze(1).expand_as(u), u) @ self.values

    def products(self, I_out: Tensor, settings: Settings) -> Products:
        W, B, place = self.frozen, self.values, self.place
        dtype, norm = selection.accumulation_dtype(W.dtype), torch.linalg.vector_norm
        squares_A = gram_A = norm_B = gram_B = crossing = X_A = None
        if needs_gram_of_rows(settings):
            rows = W[I_out].to(dtype)
            gram_A = rows @ rows.mT
        elif settings.tau is not None:
            rows = W.index_select(0, I_out.reshape(-1))
            squares_A = norm(rows, 2, dim=1, dtype=dtype).square_().view(I_out.shape)
        if settings.coupled:
            local, held = self.shard.locate(self.I_in)
            X_A = gather(self.x.detach(), local).masked_fill_(~held.unsqueeze(1), 0.0)
        squares_A, gram_A, X_A = sharding.add_up([squares_A, gram_A, X_A], self.shard)
        if needs_gram_of_columns(settings):
            gram_B = B.to(dtype) @ B.to(dtype).mT
            if place is None:
                gram_B = gram_B[None]
            else:
                gram_B = gram_B[place.unsqueeze(2), place.unsqueeze(1)]
        elif settings.tau is not None:
            norm_B = norm(B, 2, dim=1, dtype=dtype)
            norm_B = norm_B[None] if place is None else norm_B[place]
        if settings.second_order:
            of_B = torch.arange(len(B), device=B.device)[None] if place is None else place
            crossing = B[of_B.unsqueeze(1), I_out.unsqueeze(2)].to(dtype)
        norm_A = None if squares_A is None else squares_A.sqrt()
        t = gather(self.total, I_out)
        return Products(t, X_A, norm_A, gram_A, norm_B, gram_B, crossing)
