"""One group of tokens on a CPU in few torch calls, for the torch backend (SPEC §2–§5 and §7).

A call of torch costs as much as the work itself where a token is decoded. On a CPU a number may be
read without waiting for a device, so what depends on r numbers alone is worked out in Python.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vps import selection
from vps.coupling import Joint
from vps.policy import FLOOR_GUARD, NUMBERS, Settings
from vps.torch_backend import Inputs, needs_gradient

WIDE = (torch.float32, torch.float64)  # dtypes in which sums may be taken


def sharpen(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor] | None:
    """Output ``[1, T, d_out]`` and ``I_in`` ``[1, r]``, without a gradient.

    ``None`` where the call is not of this kind (eager, one group whose tokens all count, plain
    selection, component clip and first order) or a statistic is not finite.
    """
    x, W, bias, mask, I_in, I_out, policy, entropy, H, pooled = inputs
    if len(x) != 1 or mask is not None or not _is_plain(settings) or needs_gradient(inputs):
        return None
    if not selection.is_read_freely(x):
        return None
    known = H is not None  # and stays as it is
    H = F.linear(x, W) if H is None else H
    h = _values(H)
    best_in = _best(_scores(_values(x)), settings.r) if I_in is None else I_in[0]
    best_out = _best(_scores(h), settings.r) if I_out is None else I_out[0]
    energy = 0.0
    if settings.adaptive:
        energy = _energy(h) if pooled is None else float(pooled)
    if best_in is None or best_out is None or not math.isfinite(energy):
        return None
    numbers = policy.tolist()
    gamma, rank = _decide(numbers, energy, entropy, settings.r)
    scale = [gamma] * rank
    if len(numbers) > NUMBERS:
        scale = [gamma * factor for factor in numbers[NUMBERS:][:rank]]
    add = _add_to_one if h.dim() == 1 and h.dtype in WIDE else _add
    y = H.clone() if known else H
    add(_values(y), W, best_in, best_out, scale, settings.tau)
    return (y if bias is None else y.add_(bias)), I_in if I_in is not None else best_in.view(1, -1)


def couple(
    x: Tensor,
    W_q: Tensor,
    W_k: Tensor,
    mask: Tensor | None,
    I_in: Tensor | None,
    r: int,
    heads: int,
    kv_heads: int,
) -> Joint | None:
    """As :func:`vps.coupling.couple`; ``None`` as for :func:`sharpen`, and where scores tie."""
    if len(x) != 1 or mask is not None or not selection.is_read_freely(x):
        return None
    H_q, H_k = F.linear(x, W_q), F.linear(x, W_k)
    q, k = _values(H_q), _values(H_k)
    d_q, d_k, size, share = len(W_q), len(W_k), len(W_k) // kv_heads, heads // kv_heads
    energy = (_energy(q) * d_q + _energy(k) * d_k) / (d_q + d_k)
    best_in = _best(_scores(_values(x)), r) if I_in is None else I_in[0]
    if best_in is None or not math.isfinite(energy):
        return None
    s_q = _scores(q).double()
    joint = s_q.view(kv_heads, share, size).sum(1).view(-1).mul_(_scores(k))
    I_k = _best(joint, r)
    if I_k is None:
        return None
    ways = [
        [(j // size * share + way) * size + j % size for way in range(share)] for j in I_k.tolist()
    ]  # the query channels that a key channel meets
    scores = s_q[torch.tensor(ways)].tolist()
    I_q = torch.tensor([own[s.index(max(s))] for own, s in zip(ways, scores, strict=True)])
    pooled = torch.tensor([energy], dtype=selection.accumulation_dtype(x.dtype))
    return Joint(H_q, H_k, pooled, torch.stack([best_in, I_q, I_k]).unsqueeze(0))


def _is_plain(settings: Settings) -> bool:
    return settings.clamp is None and not (
        settings.coupled or settings.second_order or settings.spectral
    )


def _values(group: Tensor) -> Tensor:
    """``[T, d]`` of ``[1, T, d]``, or ``[d]`` where T is 1."""
    return group.view(-1) if group.shape[1] == 1 and group.is_contiguous() else group[0]


def _scores(values: Tensor) -> Tensor:
    """Sum of |values| over the tokens, ``[d]``, in the accumulation dtype where there are some."""
    size = values.abs()
    if size.dim() == 1:
        return size
    return size.sum(0, dtype=selection.accumulation_dtype(values.dtype))


def _best(scores: Tensor, r: int) -> Tensor | None:
    """Indices ``[r]`` of the largest ``[d]``, ties to the lower; ``None`` where not finite."""
    best, index = scores.topk(min(r + 1, len(scores)))
    ranked = best.tolist()
    if not math.isfinite(ranked[0]):  # NaN, too, sorts first
        return None
    if len(set(ranked)) == len(ranked):
        return index[:r]
    return selection.top_k(scores.to(selection.accumulation_dtype(scores.dtype)), r)


def _energy(values: Tensor) -> float:
    """``E``, the mean square; infinite or NaN where an element is."""
    if values.dim() == 1 and values.dtype in WIDE:
        return float(torch.dot(values, values)) / len(values)
    norm = torch.linalg.vector_norm(values, dtype=selection.accumulation_dtype(values.dtype))
    return float(norm) ** 2 / values.numel()


def _decide(
    policy: list[float], energy: float, entropy: Tensor | None, r: int
) -> tuple[float, int]:
    """γ and the active rank, as :func:`vps.policy.decide` has them."""
    factor, g_low, g_high, r_low, r_high, k_low, k_high = policy[:7]
    sigma = -math.expm1(-energy)
    if entropy is not None:
        sigma = max(sigma, min(1.0, float(entropy) / 3))
    sigma = min(1.0, factor * sigma)
    rank = int(r_low + (r_high - r_low) * sigma + FLOOR_GUARD)
    topk = int(k_low + (k_high - k_low) * sigma + FLOOR_GUARD)
    return g_low + (g_high - g_low) * sigma, min(r, rank, topk)


def _add_to_one(
    h: Tensor, W: Tensor, I_in: Tensor, I_out: Tensor, scale: list[float], tau: float | None
) -> None:
    """As :func:`_add` for one token, h ``[d_out]``: a column of W after the other."""
    values = h.index_select(0, I_out).tolist()
    for i, j, value, own in zip(I_in.tolist(), I_out.tolist(), values, scale, strict=False):
        column = W.select(1, i)
        if tau is not None:
            row = W.select(0, j)
            square = float(torch.dot(row, row)) * float(torch.dot(column, column))
            own /= max(1.0, math.sqrt(square) / tau)
        h.add_(column, alpha=own * value)


def _add(
    h: Tensor, W: Tensor, I_in: Tensor, I_out: Tensor, scale: list[float], tau: float | None
) -> None:
    """Add ``h[:, I_out] C Bᵀ`` to h ``[T, d_out]``, C being ``scale`` after the clip by ``tau``.

    ``scale`` is of the active columns, the first of both selections ``[r]``.
    """
    h = h if h.dim() == 2 else h.unsqueeze(0)
    chosen = I_out[: len(scale)]
    B = W.index_select(1, I_in[: len(scale)])
    dtype = selection.accumulation_dtype(W.dtype)
    if tau is not None:
        norms = [
            torch.linalg.vector_norm(vectors, dim=dim, dtype=dtype).tolist()
            for vectors, dim in ((W.index_select(0, chosen), 1), (B, 0))
        ]
        scale = [own / max(1.0, a * b / tau) for own, a, b in zip(scale, *norms, strict=True)]
    u = h.index_select(1, chosen) * torch.tensor(scale, dtype=dtype)
    h.addmm_(u.to(h.dtype), B.t())
