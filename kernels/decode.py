"""Decode one step in two kernels: up to 16 tokens, each its own group (README.md, Decoding).

``y = H + b + γ·clamp(H[:, I_out] C W[:, I_in]ᵀ)``, ``H = x Wᵀ``, SK of order 1. ``gemv`` streams W
once and ``apply`` adds the update; layers that read one x share both launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vps.kernels import apply, couple, gemv, tuning
from vps.kernels import select as selection

LARGEST_R = 8
LARGEST_RECORDS = 8192


class Layer(NamedTuple):
    """Hold the tensors of one layer.

    Args:
        weight: ``[d_out, d_in]``, any strides.
        bias: ``[d_out]`` or ``None``.
        policy: float64 ``[9]``: factor, then the bounds of γ, rank, topk and order; ``[9 + r]``
            with a factor of each column.
    """

    weight: Tensor
    bias: Tensor | None
    policy: Tensor


def refusal(x: Tensor, weight: Tensor, r: int) -> str | None:
    """Say why :func:`launch` does not take this call, or ``None`` when it does."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or weight.dtype != x.dtype:
        return f"x and weight must be of one dtype of 16 or 32 bits, got {x.dtype}, {weight.dtype}"
    if x.dim() != 3 or x.shape[1] != 1 or not 1 <= x.shape[0] <= gemv.LARGEST_N:
        return f"x must be [1 to {gemv.LARGEST_N}, 1, d_in], got {tuple(x.shape)}"
    if x.shape[2] != weight.shape[1] or x.shape[2] == 0:
        return f"weight must be [d_out, {x.shape[2]}] to fit x, got {tuple(weight.shape)}"
    if not 1 <= r <= min(LARGEST_R, *weight.shape):
        return f"r must be from 1 to {min(LARGEST_R, *weight.shape)}, got {r}"
    tiles = tuning.steps(weight.shape[0], tuning.gemv_rows(weight.shape[0]))
    if tiles * r > LARGEST_RECORDS:
        return f"d_out = {weight.shape[0]} has too many tiles for r = {r}"
    return None


def together(layers: Sequence[Layer]) -> bool:
    """Return whether one launch takes these layers, each of which it takes by itself.

    Their tiles must have one height and their policies one length.
    """
    heights = {tuning.gemv_rows(layer.weight.shape[0]) for layer in layers}
    return len(heights) == 1 and len({layer.policy.numel() for layer in layers}) == 1


def launch(
    x: Tensor,
    layers: Sequence[Layer],
    mask: Tensor | None,
    I_in: Tensor | None,
    I_out: Tensor | None,
    entropy: Tensor | None,
    r: int,
    adaptive: bool,
    tau: float | None,
    clamp: float | None,
) -> list[apply.Applied]:
    """Compute sharpened layers of one x for a few tokens, each its own group (SK, order 1).

    Two launches for all layers if :func:`together` says so, else two for each; one more selects.

    Args:
        x: ``[N, 1, d_in]``, N from 1 to 16, any strides.
        layers: those that read x, such as query, key and value, or gate and up.
        mask: bool ``[N, 1]``, whether a token counts, or ``None``.
        I_in: int64 ``[N, r]``, or ``None`` to select here.
        I_out: int64 ``[N, layers, r]``, or ``None`` to select here.
        entropy: float64 ``[2]``, ℋ in nats or −1, and the factor of the history; or ``None``.
        r: columns, from 1 to 8.
        adaptive: whether the policy needs the energy.
        tau: bound of the component clip, a constant of the kernel, or ``None``.
        clamp: bound of each element of the update, a constant of the kernel, or ``None``.

    Returns:
        y, features, core, γ and t of each layer. Every row has the bits it has when its token and
        its layer come alone.

    Raises:
        ValueError: what :func:`refusal` says of a layer.
    """
    for layer in layers:
        if (reason := refusal(x, layer.weight, r)) is not None:
            raise ValueError(f"decode: {reason}")
    if I_in is None:
        I_in = selection.launch(x[:, 0], r, True)
    I_in = selection.with_rows(I_in)
    if not together(layers):
        return [
            launch(
                x, [layer], mask, I_in, None if I_out is None else I_out[:, at : at + 1], entropy,
                r, adaptive, tau, clamp,
            )[0]
            for at, layer in enumerate(layers)
        ]  # fmt: skip
    product = gemv.launch(
        x, [layer.weight for layer in layers], mask, I_in, r, I_out is None, adaptive,
        tau is not None,
    )  # fmt: skip
    return apply.launch(
        I_in, product, [layer.bias for layer in layers], mask, I_out, None,
        [layer.policy for layer in layers], entropy, adaptive, tau, clamp,
    )  # fmt: skip


def launch_pair(
    x: Tensor,
    query: Layer,
    key: Layer,
    mask: Tensor | None,
    I_in: Tensor | None,
    entropy: Tensor | None,
    r: int,
    adaptive: bool,
    tau: float | None,
    clamp: float | None,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a query and a key that select together (SPEC §7), as :func:`launch` does.

    In three launches, the second of which couples; each takes both layers if :func:`together` says
    so. The arguments are those of :func:`launch` and of :func:`vps.kernels.couple.launch`.

    Returns:
        y of the query and of the key ``[N, 1, d_out]``, and I_in ``[N, r]``.
    """
    I_in = selection.with_rows(selection.launch(x[:, 0], r, True) if I_in is None else I_in)
    parts = [[query, key]] if together([query, key]) else [[query], [key]]
    products = [
        gemv.launch(
            x, [layer.weight for layer in part], mask, I_in, r, False, False, tau is not None
        )
        for part in parts
    ]
    counted = None if mask is None else mask[:, 0]
    H_q, H_k = products[0].of(0), products[-1].of(-1)
    energy, features = couple.launch(H_q, H_k, [], counted, I_in, heads, kv_heads)
    chosen = [features[:, 1:]] if len(parts) == 1 else [features[:, 1:2], features[:, 2:]]
    y_q, y_k = (
        result.y
        for part, product, I_out in zip(parts, products, chosen, strict=True)
        for result in apply.launch(
            I_in, product, [layer.bias for layer in part], mask, I_out,
            energy if adaptive else None, [layer.policy for layer in part], entropy, adaptive, tau,
            clamp,
        )
    )  # fmt: skip
    return y_q, y_k, features[:, 0]
