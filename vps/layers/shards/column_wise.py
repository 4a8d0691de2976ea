"""Compute with W split by rows: each rank holds some outputs, and the whole of x.

Ranks exchange for G groups of T tokens (SPEC §2–§5, §7):

- by one all-gather, each rank's best r candidates: ``2 · G · r`` numbers, or ``3 · G · r`` for a
  coupled query and key;
- by one all-reduce, ``t = H[:, I_out]`` ``[G, T, r]`` of each projection, and the norms,
  ``2 · G · r``, or under another clip or the second order up to ``3 · G · r²``;
- for the clip of SC and the spectral clip, the selected rows of W
  (:func:`vps.layers.shards.sharding.products_of_rows`);
- in the backward pass, sums of ``∂L/∂t`` ``[G, T, r]`` and of ``∂L/∂x``, as for the base layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vps.algorithm import coupling, selection
from vps.algorithm.policy import Settings
from vps.algorithm.weight import (
    MatrixProjection,
    Products,
    gather,
    needs_gram_of_columns,
    needs_gram_of_rows,
)
from vps.layers.shards import sharding
from vps.layers.shards.sharding import ShardWeight

_norm = torch.linalg.vector_norm


class ColumnShard(ShardWeight):
    """This rank's rows of W.

    Args:
        W: ``[held, d_in]``.
        shard: how the outputs are split.
    """

    @property
    def widths(self) -> tuple[int, int]:
        return self.shard.bounds[-1], self.W.shape[1]

    def project(
        self, x: Tensor, bias: Tensor | None, I_in: Tensor, H: Tensor | None = None
    ) -> ColumnProjection:
        return ColumnProjection(self, sharding.copied(x, self.shard), bias, I_in)

    def plain(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(sharding.copied(x, self.shard), self.W, bias)

    def rows(self, projections: Sequence[Any], outputs: Sequence[Tensor]) -> list[Tensor | None]:
        own: list[Tensor | None] = []
        for one, I_out in zip(projections, outputs, strict=True):
            local, held = one.shard.locate(I_out)
            own.append(one.frozen[local].masked_fill(~held.unsqueeze(2), 0.0))
        return sharding.add_up(own, self.shard)

    def select_outputs(
        self,
        weights: Sequence[Any],
        scores: Sequence[Tensor],
        r: int,
        heads: tuple[int, int] | None,
    ) -> list[Tensor]:
        last = weights[-1].shard
        k = min(r, last.size)
        if heads is None:
            index = selection.top_k(scores[0], k)
            best = scores[0].gather(1, index)
            return list(sharding.best_of_all(best, [index + last.offset], r, last))
        size = last.bounds[-1] // heads[1]
        own = [weight.shard.size // size for weight in weights]  # heads on this rank
        contribution, I_q, I_k = coupling.contributions(scores[0], scores[1], k, *own)
        features = [I_k + last.offset, I_q + self.shard.offset]
        I_k, I_q = sharding.best_of_all(contribution.gather(1, I_k), features, r, last)
        return [I_q, I_k]

    def complete(
        self,
        projections: Sequence[Any],
        outputs: Sequence[Tensor],
        settings: Sequence[Settings],
        energies: Sequence[Tensor],
    ) -> tuple[list[Products], Tensor | None]:
        grams = _products_of_rows(projections, outputs, settings)
        each = zip(projections, outputs, settings, grams, strict=True)
        parts = [one.parts(I_out, own, gram) for one, I_out, own, gram in each]
        held = zip(energies, projections, strict=bool(energies))
        total = sum(energy * one.H.shape[-1] for energy, one in held) if energies else None
        energy, *sums = sharding.add_up([total, *(n for own in parts for n in own)], self.shard)
        if energy is not None:
            energy = energy / sum(one.shard.bounds[-1] for one in projections)
        width, found = len(Products._fields), []
        for at, one in enumerate(projections):
            numbers = Products(*sums[at * width : (at + 1) * width])  # type: ignore[arg-type]
            found.append(one.completed(numbers, settings[at]))
        return found, energy


class ColumnProjection(MatrixProjection):
    """Tokens through this rank's rows of W.

    Args:
        weight: this rank's rows.
        x: ``[G, T, d_in]``; its gradient is summed over the ranks.
        bias: ``[held]`` or ``None``.
        I_in: ``[G, r]``.
    """

    def __init__(self, weight: ColumnShard, x: Tensor, bias: Tensor | None, I_in: Tensor) -> None:
        W = sharding.padded(weight.W, 0)
        super().__init__(x, W, bias, F.linear(x, W), I_in)
        self.own_W, self.shard = weight.W, weight.shard
        self.t: Tensor | None = None

    def base(self) -> Tensor:
        return F.linear(self.x, self.own_W, self.b)

    def selected(self, I_out: Tensor) -> Tensor:
        assert self.t is not None
        local, held = self.shard.locate(I_out)
        own = super().selected(local).masked_fill(~held.unsqueeze(1), 0.0)
        return sharding.copied(sharding.reduced(own, self.t, self.shard), self.shard)

    def parts(self, I_out: Tensor, settings: Settings, gram_A: Tensor | None) -> Products:
        """Return this rank's summands of the products, with ``norm_B`` squared."""
        W, dtype, norm = self.frozen, selection.accumulation_dtype(self.W.dtype), _norm
        local, held = self.shard.locate(I_out)
        norm_A = norm_B = gram_B = crossing = None
        if settings.tau is not None and gram_A is None:
            rows = W.index_select(0, local.reshape(-1))
            norm_A = norm(rows, 2, dim=1, dtype=dtype).view(local.shape).masked_fill_(~held, 0.0)
        if needs_gram_of_columns(settings):
            columns = (W[:, self.I_in] if self.B is None else self.B).to(dtype)
            gram_B = torch.einsum("ogc,oge->gce", columns, columns)
        elif settings.tau is not None and self.B is not None:
            norm_B = norm(self.B, 2, dim=0, dtype=dtype).square_()
        elif settings.tau is not None:
            norm_B = norm(W, 2, dim=0, dtype=dtype).square_()[self.I_in]
        if settings.second_order:
            crossing = W[local.unsqueeze(2), self.I_in.unsqueeze(1)].to(dtype)
            crossing = crossing.masked_fill(~held.unsqueeze(2), 0.0)
        t = gather(self.H.detach(), local).masked_fill_(~held.unsqueeze(1), 0.0)
        return Products(t, None, norm_A, gram_A, norm_B, gram_B, crossing)

    def completed(self, numbers: Products, settings: Settings) -> Products:
        """Return the products of the whole layer from the sums over the ranks."""
        self.t = numbers.t
        return numbers._replace(
            X_A=gather(self.x.detach(), self.I_in) if settings.coupled else None,
            norm_B=None if numbers.norm_B is None else numbers.norm_B.sqrt(),
        )


def _products_of_rows(
    projections: Sequence[ColumnProjection], outputs: Sequence[Tensor], settings: Sequence[Settings]
) -> list[Tensor | None]:
    """Return this rank's summand of ``gram_A`` for each projection that needs it, else ``None``."""
    wanted = [needs_gram_of_rows(own) for own in settings]
    chosen = [at for at, one in enumerate(wanted) if one]
    if not chosen:
        return [None] * len(wanted)
    found = iter(
        sharding.products_of_rows(
            [projections[at].own_W.detach() for at in chosen],
            [outputs[at] for at in chosen],
            [projections[at].shard for at in chosen],
        )
    )
    return [next(found) if one else None for one in wanted]
