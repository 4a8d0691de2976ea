"""Decode one step in two kernels: up to 16 tokens, each its own group (README.md, Decoding).

``y = H + b + γ·clamp(H[:, I_out] C W[:, I_in]ᵀ)``, ``H = x Wᵀ``, SK of order 1. ``gemv`` streams W
once and ``apply`` adds the update; layers that read one x share both launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vps.kernels import select as selection
from vps.kernels import tuning
from vps.kernels.decode import apply, couple, gemv

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


def kind(layer: Layer) -> tuple[int, int]:
    """Return what layers must have in common to share a launch.

    This is the height of their tiles and the length of their policies.
    """
    return tuning.gemv_rows(layer.weight.shape[0]), layer.policy.numel()


def launch(*arguments: Any) -> list[apply.Applied]:
    """Return the outputs of :func:`step`, of which these are the arguments."""
    return step(*arguments).outputs


class Step(NamedTuple):
    """Hold what a step computes, and what its kernels leave for each other.

    Args:
        outputs: y, features, core, γ and t of each layer.
        I_in: int64 ``[N, r]``.
        products: of the layers that share a launch.
        joint: energy ``[N]`` and features ``[N, 3, r]`` of a query and a key, or ``None``.
    """

    outputs: list[apply.Applied]
    I_in: Tensor
    products: list[gemv.Product]
    joint: tuple[Tensor, Tensor] | None


def step(
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
    heads: tuple[int, int] | None = None,
) -> Step:
    """Compute sharpened layers of one x for a few tokens, each its own group (SK, order 1).

    Two launches for all layers of one :func:`kind`; one more selects, and one couples.

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
        heads: query and key-value heads if the first two layers select together (SPEC §7), of
            which I_out must then be ``None``; or ``None``.

    Every row has the bits it has when its token comes alone. With wider layers beside it a layer
    may sum its tiles in another order on a GPU, so its γ may differ in the last bit.

    Raises:
        ValueError: what :func:`refusal` says of a layer.
    """
    for layer in layers:
        if (reason := refusal(x, layer.weight, r)) is not None:
            raise ValueError(f"decode: {reason}")
    selected_here = I_in is None
    I_in = selection.with_rows(selection.launch(x[:, 0], r, True) if I_in is None else I_in)
    if I_out is not None:
        I_out = selection.with_rows(I_out)
    chosen = [None if I_out is None else I_out[:, at] for at in range(len(layers))]
    coupled = range(0 if heads is None else 2)
    parts: dict[tuple[int, int], list[int]] = {}
    for at, layer in enumerate(layers):
        parts.setdefault(kind(layer), []).append(at)
    products: list[gemv.Product] = []
    place: dict[int, tuple[int, int]] = {}  # by layer, its product and its number in that
    for part in parts.values():
        selects = I_out is None and any(at not in coupled for at in part)
        measures = adaptive and any(at not in coupled for at in part)
        weights = [layers[at].weight for at in part]
        follows = selected_here or bool(products)
        clips = tau is not None
        product = gemv.launch(x, weights, mask, I_in, r, selects, measures, clips, follows)
        place |= {at: (len(products), number) for number, at in enumerate(part)}
        products.append(product)
    joint = None
    if heads is not None:
        counted = None if mask is None else mask[:, 0]
        H_q, H_k = (products[of].of(number) for of, number in (place[0], place[1]))
        joint = couple.launch(H_q, H_k, [], counted, I_in, *heads, True)
        chosen[:2] = joint[1][:, 1], joint[1][:, 2]
    outputs: dict[int, apply.Applied] = {}
    for part, product in zip(parts.values(), products, strict=True):
        own = [layers[at] for at in part]
        pooled = adaptive and joint is not None and any(at in coupled for at in part)
        found = apply.launch(
            I_in, product, [layer.bias for layer in own], mask, [chosen[at] for at in part],
            joint[0] if pooled and joint is not None else None, [layer.policy for layer in own],
            entropy, adaptive, tau, clamp,
        )  # fmt: skip
        outputs |= dict(zip(part, found, strict=True))
    return Step([outputs[at] for at in range(len(layers))], I_in, products, joint)
