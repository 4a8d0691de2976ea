"""Split the features of a layer over the ranks of a group, and exchange numbers between them.

Every rank decides from the numbers that come back. These are the same everywhere, so no two ranks
ever select different features.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from vps.algorithm.weight import Weight, cast


class Shard(NamedTuple):
    """One dim of a weight, split over the ranks of a group in their order.

    Args:
        group: the process group.
        rank: this process's rank in the group.
        bounds: rank p holds features ``bounds[p]`` to ``bounds[p + 1]``.
    """

    group: Any
    rank: int
    bounds: tuple[int, ...]

    @property
    def offset(self) -> int:
        """Return the first feature that this rank holds."""
        return self.bounds[self.rank]

    @property
    def size(self) -> int:
        """Return how many features this rank holds, perhaps 0."""
        return self.bounds[self.rank + 1] - self.offset

    @property
    def world(self) -> int:
        """Return the number of ranks in the group."""
        return len(self.bounds) - 1

    def locate(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the position of each feature on this rank, and whether this rank holds it.

        Both have the shape of ``index``. The position of a feature of another rank is arbitrary.
        """
        local = index - self.offset
        held = (local >= 0) & (local < self.size)
        return local.clamp(0, max(0, self.size - 1)), held


class ShardWeight(Weight):
    """This rank's part of W.

    Args:
        W: rows ``[held, d_in]`` or columns ``[d_out, held]``.
        shard: how the outputs, or the inputs, are split.
    """

    def __init__(self, W: Tensor, shard: Shard) -> None:
        self.W, self.shard = W, shard

    def parameters(self) -> Iterable[Tensor]:
        return (self.W,)

    def cast(self, dtype: torch.dtype) -> Self:
        return type(self)(cast(self.W, dtype), self.shard)


def split_evenly(features: int, ranks: int) -> tuple[int, ...]:
    """Return bounds of ``ranks`` parts, as torch.chunk and DTensor split: the last may be short."""
    part = -(-features // ranks)
    return tuple(min(rank * part, features) for rank in range(ranks + 1))


def padded(values: Tensor, dim: int) -> Tensor:
    """Return ``values``, with one feature of zeros where this rank holds none."""
    if values.shape[dim]:
        return values
    shape = list(values.shape)
    shape[dim] = 1
    return values.new_zeros(shape)


def best_of_all(
    scores: Tensor, features: Sequence[Tensor], r: int, shard: Shard
) -> tuple[Tensor, ...]:
    """Return the best r candidates of all ranks, from the best of each, by one all-gather.

    Each rank sends ``(1 + n) · r`` numbers a group.

    Args:
        scores: scores of this rank's best candidates, at least 0, best first,
            ``[G, min(r, held)]``.
        features: n numbers that describe each candidate, of the shape of ``scores``; the first is
            the feature's index in the whole layer.
        r: how many to find.
        shard: the ranks.

    Returns:
        ``features`` of the best, each ``[G, r]``, ties to the lower index.
    """
    rows = torch.stack([scores.double(), *(feature.double() for feature in features)], 1)
    message = rows.new_full((*rows.shape[:2], r), -1.0)
    message[..., : rows.shape[-1]] = rows
    everyone = _from_all(message, shard)
    # Ranks hold features in ascending order, so a stable sort leaves ties to the lower index.
    merged = everyone.permute(1, 2, 0, 3).flatten(2)
    order = merged[:, 0].sort(dim=-1, descending=True, stable=True).indices[:, :r]
    return tuple(column.gather(1, order).long() for column in merged.unbind(1)[1:])


def _from_all(message: Tensor, shard: Shard) -> Tensor:
    """Return the messages of all ranks, of one shape, along a new first dim."""
    everyone = [torch.empty_like(message) for _ in range(shard.world)]
    dist.all_gather(everyone, message, group=shard.group)
    return torch.stack(everyone)


def gather(values: Tensor, shard: Shard) -> Tensor:
    """Return all features of ``values`` ``[..., held]``, in their order."""
    rows = values.reshape(-1, values.shape[-1])
    widest = shard.bounds[1]
    own = rows.new_zeros(len(rows), widest)
    own[:, : rows.shape[1]] = rows
    joined = _from_all(own, shard).transpose(0, 1).flatten(1)
    # The last part may be shorter than the others, and is padded.
    return joined[:, : shard.bounds[-1]].reshape(*values.shape[:-1], -1)


def add_up(parts: Sequence[Tensor | None], shard: Shard) -> list[Tensor | None]:
    """Return every part summed over the ranks, by one all-reduce; ``None`` stays.

    Parts are summed in their widest dtype, and each sum has the dtype of its part.
    """
    given = [part for part in parts if part is not None]
    if not given:
        return list(parts)
    dtype = given[0].dtype
    for part in given[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    flat = torch.cat([part.reshape(-1).to(dtype) for part in given])
    dist.all_reduce(flat, group=shard.group)
    sums = iter(flat.split([part.numel() for part in given]))
    return [None if part is None else next(sums).view(part.shape).to(part.dtype) for part in parts]


def reduced(own: Tensor, total: Tensor, shard: Shard) -> Tensor:
    """Return ``total``, the sum of every rank's ``own``; each summand gets its gradient."""
    if not (torch.is_grad_enabled() and own.requires_grad):
        return total
    result: Tensor = _Reduced.apply(own, total, shard)
    return result


def copied(values: Tensor, shard: Shard) -> Tensor:
    """Return values that are the same on every rank; their gradient is summed over the ranks."""
    if not (torch.is_grad_enabled() and values.requires_grad):
        return values
    result: Tensor = _Copied.apply(values, shard)
    return result


# Each is the backward pass of the other, so that gradients of gradients are right, too.


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, total: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return copied(g, ctx.shard), None, None


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        total = g.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.shard.group)
        return reduced(g, total, ctx.shard), None


def products_of_rows(
    weights: Sequence[Tensor], indices: Sequence[Tensor], shards: Sequence[Shard]
) -> list[Tensor]:
    """Return this rank's summands of the inner products of selected rows of weights split by rows.

    Rows that different ranks hold have to meet. By one all-to-all each rank takes one part of the
    inputs of every distinct selected row. This moves each element of these rows once: at most
    ``G · r · d_in`` for a weight, and ``1/P`` of that to each of P ranks. No exchange of fewer
    numbers gives the inner product of two vectors that two ranks hold.

    Args:
        weights: this rank's rows of each weight, ``[held, d_in]``.
        indices: selected rows of each whole weight, ``[G, r]``.
        shards: how the rows of each weight are split, over one group.

    Returns:
        ``[G, r, r]`` for each weight, in its dtype or float32, to be summed over the ranks.
    """
    ranks, rank = shards[0].world, shards[0].rank
    parts = split_evenly(weights[0].shape[1], ranks)
    widths = [end - start for start, end in zip(parts, parts[1:], strict=False)]
    places, counts, owns = [], [], []
    for weight, index, shard in zip(weights, indices, shards, strict=True):
        rows, place = torch.unique(index, return_inverse=True)  # ascending, so by rank
        listed = rows.tolist()
        firsts = [bisect_left(listed, bound) for bound in shard.bounds]
        places.append(place)
        counts.append([end - start for start, end in zip(firsts, firsts[1:], strict=False)])
        own = weight[rows[firsts[rank] : firsts[rank + 1]] - shard.offset]
        owns.append(own.split(widths, dim=1))
    width = widths[rank]
    received = weights[0].new_empty(sum(map(sum, counts)) * width)
    dist.all_to_all_single(
        received,
        torch.cat([own[other].reshape(-1) for other in range(ranks) for own in owns]),
        [sum(count[other] for count in counts) * width for other in range(ranks)],
        [sum(own[other].numel() for own in owns) for other in range(ranks)],
        group=shards[0].group,
    )
    sizes = [count[other] * width for other in range(ranks) for count in counts]
    pieces = received.split(sizes)
    products = []
    for number, place in enumerate(places):
        joined = torch.cat(pieces[number :: len(places)]).view(-1, width)
        picked = joined.to(torch.promote_types(joined.dtype, torch.float32))[place]
        products.append(picked @ picked.mT)
    return products
