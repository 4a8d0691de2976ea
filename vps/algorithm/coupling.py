"""Couple the query and key projections of an attention block: they select together (SPEC §7).

``c[g, j] = (Σ_{h in group g} s_out^q[h, j]) · s_out^k[g, j]`` over key-value heads g and head
channels j; K selects the best ``(g, j)``, Q the same channels of ``h* = argmax_{h in g} s_out^q``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vps.algorithm import selection


class Joint(NamedTuple):
    """What two projections of the same x decide together.

    Args:
        H_q, H_k: base products, ``[G, T, d_q]`` and ``[G, T, d_k]``.
        energy: mean square over both, ``[G]`` in the accumulation dtype.
        features: ``I_in``, then ``I_out`` of the query and of the key, ``[G, 3, r]``.
    """

    H_q: Tensor
    H_k: Tensor
    energy: Tensor
    features: Tensor


Statistics = Callable[[Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]]


def couple(
    x: Tensor,
    W_q: Tensor,
    W_k: Tensor,
    mask: Tensor | None,
    I_in: Tensor | None,
    r: int,
    heads: int,
    kv_heads: int,
    statistics: Statistics = selection.counted_statistics,
) -> Joint:
    """Compute base products, pooled energy and selections of a query and a key projection.

    Args:
        x: ``[G, T, d_in]``.
        W_q, W_k: ``[d_q, d_in]`` and ``[d_k, d_in]``.
        mask: bool ``[G, T]``, True counts; ``None`` when all count.
        I_in: selected inputs ``[G, r]`` if they are known.
        r: columns of the selection, at most ``d_in`` and ``d_k``.
        heads: query heads.
        kv_heads: key-value heads, a divisor of ``heads``.
        statistics: computes scores ``[G, d]`` and energy ``[G]`` of values ``[G, T, d]`` under a
            mask, as :func:`selection.counted_statistics` does.
    """
    H_q, H_k = F.linear(x, W_q), F.linear(x, W_k)
    return decide(x, H_q, H_k, mask, I_in, r, heads, kv_heads, statistics)


def decide(
    x: Tensor,
    H_q: Tensor,
    H_k: Tensor,
    mask: Tensor | None,
    I_in: Tensor | None,
    r: int,
    heads: int,
    kv_heads: int,
    statistics: Statistics = selection.counted_statistics,
) -> Joint:
    """Decide as :func:`couple` does, from base products ``[G, T, d_q]`` and ``[G, T, d_k]``."""
    s_q, energy_q = statistics(H_q, mask, True)
    s_k, energy_k = statistics(H_k, mask, True)
    assert energy_q is not None and energy_k is not None
    d_q, d_k = H_q.shape[-1], H_k.shape[-1]
    energy = (energy_q * d_q + energy_k * d_k) / (d_q + d_k)
    if I_in is None:
        I_in = selection.top_k(statistics(x, mask, False)[0], r)
    I_q, I_k = select(s_q, s_k, r, heads, kv_heads)
    return Joint(H_q, H_k, energy, torch.stack([I_in, I_q, I_k], 1))


def select(s_q: Tensor, s_k: Tensor, r: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Return ``I_out`` ``[G, r]`` of query and key, from scores ``[G, d_q]`` and ``[G, d_k]``."""
    return contributions(s_q, s_k, r, heads, kv_heads)[1:]


def contributions(
    s_q: Tensor, s_k: Tensor, r: int, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all contributions ``c``, float64 ``[G, d_k]``, and the two selections from them."""
    groups, size = s_k.shape[0], s_k.shape[1] // kv_heads
    per_group = heads // kv_heads
    query = s_q.double().view(groups, kv_heads, per_group, size)
    contribution = query.sum(2).flatten(1) * s_k.double()
    I_k = selection.top_k(contribution, r)
    best_head = query.max(2).indices.flatten(1).gather(1, I_k)
    I_q = ((I_k // size) * per_group + best_head) * size + I_k % size
    return contribution, I_q, I_k
