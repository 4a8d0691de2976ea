"""Sharpening of layers whose outputs are split over ranks: x whole, ``H`` and ``W`` in parts.

As :mod:`torch_backend`, for a ``W`` of which each rank holds some rows (SPEC §2–§5, §7). What
ranks exchange for G groups of T tokens: by one all-gather each rank's best r candidates
(``2 · G · r`` numbers, ``3 · G · r`` for a coupled query and key), and by one all-reduce for each
projection ``t = H[:, I_out]``, ``[G, T, r]``, and the norms, ``2 · G · r``, or under another clip
or the second order up to ``3 · G · r²``. Only the clip of SC and the spectral one ask for more: the
selected rows of W, as :func:`vps.layers.shards.sharding.products_of_rows` moves them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vps.algorithm import coupling, gradient, selection, torch_backend
from vps.algorithm.products import Products, build_core, needs_gram_of_rows
from vps.algorithm.torch_backend import Outputs
from vps.layers.shards import sharding
from vps.layers.shards.sharding import Projection, Shard


@torch.no_grad()
def forward(
    x: Tensor,
    mask: Tensor | None,
    projections: tuple[Projection, ...],
    I_in: Tensor | None,
    I_out: Tensor | None,
    entropy: Tensor | None,
    kv_head_size: int | None = None,
) -> list[Outputs]:
    """What this rank holds of the output, ``[G, T, held]``, and the rest, of every projection.

    Args:
        x: ``[G, T, d_in]``, the same on every rank.
        mask: bool ``[G, T]``, True counts; ``None`` when all do.
        projections: one layer, or a query and a key that are coupled.
        I_in: selected inputs ``[G, r]`` where they are known.
        I_out: selected outputs of a single layer where they are known.
        entropy: ℋ in nats, one element, or ``None``.
        kv_head_size: channels of a head of coupled projections.
    """
    settings, shard = projections[0].settings, projections[0].shard
    count = None if mask is None else mask.sum(1).clamp_(min=1)
    products = [F.linear(x, sharding.padded(p.weight, 0)) for p in projections]
    scores: list[Tensor] = []
    energy: Tensor | None = None
    if I_out is None or settings.adaptive:
        for H in products:
            sums, mean = selection.statistics(H, mask, count, settings.adaptive)
            scores.append(sums)
            if mean is not None:
                total = mean.mul_(H.shape[-1])
                energy = total if energy is None else energy + total
    if I_in is None:
        I_in = selection.top_k(selection.statistics(x, mask, count, False)[0], settings.r)
    outputs = (I_out,) if I_out is not None else _select(scores, projections, kv_head_size)
    grams = _products_of_rows(projections, outputs)
    parts = [
        _parts(H, p, I_in, index, gram)
        for H, p, index, gram in zip(products, projections, outputs, grams, strict=True)
    ]
    energy, *sums_ = sharding.add_up([energy, *(part for own in parts for part in own)], shard)
    if energy is not None:
        energy = energy / sum(p.shard.bounds[-1] for p in projections)
    width = len(Products._fields)
    return [
        _finish(
            x, H, mask, p, I_in, index, Products(*sums_[i * width : (i + 1) * width]),  # type: ignore[arg-type]
            energy, entropy,
        )
        for i, (H, p, index) in enumerate(zip(products, projections, outputs, strict=True))
    ]  # fmt: skip


def _select(
    scores: list[Tensor], projections: tuple[Projection, ...], kv_head_size: int | None
) -> tuple[Tensor, ...]:
    """``I_out`` of each projection, ``[G, r]``, from the scores of this rank's outputs."""
    r, last = projections[0].settings.r, projections[-1].shard
    k = min(r, last.size)
    if len(projections) == 1:
        index = selection.top_k(scores[0], k)
        best = scores[0].gather(1, index)
        return sharding.best_of_all(best, [index + last.offset], r, last)
    assert kv_head_size is not None
    heads, kv_heads = (p.shard.size // kv_head_size for p in projections)
    contribution, I_q, I_k = coupling.contributions(scores[0], scores[1], k, heads, kv_heads)
    features = [I_k + last.offset, I_q + projections[0].shard.offset]
    I_k, I_q = sharding.best_of_all(contribution.gather(1, I_k), features, r, last)
    return I_q, I_k


def _products_of_rows(
    projections: tuple[Projection, ...], outputs: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """This rank's summand of ``gram_A`` of each projection; ``None`` where none is needed."""
    wanted = [needs_gram_of_rows(p.settings) for p in projections]
    if not any(wanted):
        return [None] * len(projections)
    chosen = [(p, index) for p, index, one in zip(projections, outputs, wanted, strict=True) if one]
    grams = sharding.products_of_rows(
        [p.weight for p, _ in chosen], [i for _, i in chosen], [p.shard for p, _ in chosen]
    )
    found = iter(grams)
    return [next(found) if one else None for one in wanted]


def _parts(
    H: Tensor, p: Projection, I_in: Tensor, I_out: Tensor, gram_A: Tensor | None
) -> Products:
    """What this rank adds to :class:`Products`, with ``norm_B`` squared."""
    W, settings = sharding.padded(p.weight, 0), p.settings
    dtype = selection.accumulation_dtype(W.dtype)
    norm = torch.linalg.vector_norm
    local, held = p.shard.locate(I_out)
    norm_A = norm_B = gram_B = B_selected = None
    if settings.tau is not None and gram_A is None:
        rows = W.index_select(0, local.reshape(-1))
        norm_A = norm(rows, 2, dim=1, dtype=dtype).view(local.shape).masked_fill_(~held, 0.0)
    if settings.tau is not None and settings.spectral:
        B = gradient.columns(W, I_in).to(dtype)
        gram_B = torch.einsum("ogc,oge->gce", B, B)
    elif settings.tau is not None and gradient.reads_columns(W, I_in):
        norm_B = norm(gradient.columns(W, I_in), 2, dim=0, dtype=dtype).square_()
    elif settings.tau is not None:
        norm_B = norm(W, 2, dim=0, dtype=dtype).square_()[I_in]
    if settings.second_order:
        B_selected = W[local.unsqueeze(2), I_in.unsqueeze(1)].to(dtype)
        B_selected = B_selected.masked_fill(~held.unsqueeze(2), 0.0)
    t = torch_backend.selected(H, local).masked_fill_(~held.unsqueeze(1), 0.0)
    return Products(t, None, norm_A, gram_A, norm_B, gram_B, B_selected)


def _finish(
    x: Tensor,
    H: Tensor,
    mask: Tensor | None,
    p: Projection,
    I_in: Tensor,
    I_out: Tensor,
    products: Products,
    energy: Tensor | None,
    entropy: Tensor | None,
) -> Outputs:
    """The output of one projection from the sums over all ranks."""
    W, settings = sharding.padded(p.weight, 0), p.settings
    products = products._replace(
        X_A=torch_backend.selected(x, I_in) if settings.coupled else None,
        norm_B=None if products.norm_B is None else products.norm_B.sqrt(),
    )
    energy = energy.clone() if energy is not None and settings.adaptive else None
    core, gamma, t = build_core(products, p.numbers, energy, entropy, mask, settings)
    B = gradient.columns(W, I_in) if gradient.reads_columns(W, I_in) else None
    y = torch_backend.apply(H, t, core, gamma, W, I_in, B, settings.clamp, mask is not None)
    y = y[..., : p.shard.size]
    if p.bias is not None:
        y = y.add_(p.bias)
    if mask is not None:  # a group without a counted token keeps the bits of the base layer
        base = F.linear(x, p.weight, p.bias)
        y = torch.where(mask.any(1)[:, None, None], y, base)
    return Outputs(y, I_in, I_out, core, gamma, t)


class Backward(torch.autograd.Function):
    """The output of :func:`forward` with its gradient; W, B and the selection are constants.

    ``∂L/∂t`` is added up over the ranks, ``[G, T, r]``, and ``∂L/∂x`` as of the base layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Outputs,
        clamp: float | None,
        shard: Shard,
    ) -> Tensor:
        ctx.clamp, ctx.shard = clamp, shard
        ctx.save_for_backward(x if weight.requires_grad else None, weight, *out[1:])
        return out.y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, I_in, I_out, core, gamma, t = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _of_input(g, weight, I_in, I_out, core, gamma, t, ctx.clamp, ctx.shard)
            if wanted[0]
            else None,
            gradient.of_weight(g, x) if wanted[1] else None,
            gradient.of_bias(g) if wanted[2] else None,
            None,
            None,
            None,
        )


def _of_input(
    g: Tensor,
    weight: Tensor,
    I_in: Tensor,
    I_out: Tensor,
    core: Tensor,
    gamma: Tensor,
    t: Tensor,
    clamp: float | None,
    shard: Shard,
) -> Tensor:
    """``∂L/∂x`` ``[G, T, d_in]``, added up over the ranks; as :func:`gradient.of_input`."""
    W, g = sharding.padded(weight, 0), sharding.padded(g, -1)
    grad_delta = g
    if clamp is not None:
        delta = gradient.expand(gradient.mix(t, core), W, I_in)
        grad_delta = g * (delta.abs() <= clamp)
    partial = gradient.contract(grad_delta, W, I_in).to(core.dtype)
    (grad_u,) = sharding.add_up([partial], shard)
    assert grad_u is not None
    grad_t = gradient.mix(grad_u * gamma.view(-1, 1, 1), core if core.shape[1] == 1 else core.mT)
    local, held = shard.locate(I_out)
    grad_t = grad_t.to(g.dtype).masked_fill_(~held.unsqueeze(1), 0.0)
    grad_x = g.scatter_add(-1, local.unsqueeze(1).expand_as(grad_t), grad_t) @ W
    dist.all_reduce(grad_x, group=shard.group)
    return grad_x
