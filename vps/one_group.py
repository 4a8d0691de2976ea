"""One group of tokens on a CPU in few torch calls, for the torch backend (SPEC §2–§5).

A call of torch costs as much as the work itself where a token is decoded. On a CPU a number may be
read without waiting for a device, so what depends on r numbers alone is worked out in Python.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vps import selection
from vps.policy import FLOOR_GUARD, NUMBERS, Settings
from vps.torch_backend import Inputs, needs_gradient


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
    h = H[0]
    best_in = _best(x[0], settings.r) if I_in is None else I_in[0]
    best_out = _best(h, settings.r) if I_out is None else I_out[0]
    energy = 0.0
    if settings.adaptive:
        energy = _energy(h) if pooled is None else float(pooled)
    if best_in is None or best_out is None or not math.isfinite(energy):
        return None
    numbers = policy.tolist()
    gamma, rank = _decide(numbers[:NUMBERS], energy, entropy, settings.r)
    chosen = best_out[:rank]
    B = W.index_select(1, best_in[:rank])
    scale = [gamma] * rank
    if len(numbers) > NUMBERS:
        scale = [gamma * factor for factor in numbers[NUMBERS:][:rank]]
    if settings.tau is not None:
        norms = zip(scale, _norms(W.index_select(0, chosen), 1), _norms(B, 0), strict=True)
        scale = [own / max(1.0, a * b / settings.tau) for own, a, b in norms]
    t = h.index_select(1, chosen)
    u = t * torch.tensor(scale, dtype=selection.accumulation_dtype(W.dtype))
    u = u.to(h.dtype)
    y = (torch.addmm(h, u, B.t()) if known else h.addmm_(u, B.t())).unsqueeze(0)
    return (y if bias is None else y.add_(bias)), best_in.unsqueeze(0)


def _is_plain(settings: Settings) -> bool:
    return settings.clamp is None and not (
        settings.coupled or settings.second_order or settings.spectral
    )


def _best(values: Tensor, r: int) -> Tensor | None:
    """Indices ``[r]`` of the largest mean |values| ``[T, d]``; ``None`` where one is not finite."""
    size = values.abs()
    dtype = selection.accumulation_dtype(values.dtype)
    scores = size[0] if len(size) == 1 else size.sum(0, dtype=dtype)
    best, index = scores.topk(min(r + 1, len(scores)))
    ranked = best.tolist()
    if not math.isfinite(ranked[0]):  # NaN, too, sorts first
        return None
    if all(a > b for a, b in zip(ranked, ranked[1:], strict=False)):
        return index[:r]
    return selection.top_k(scores.to(dtype), r)


def _energy(h: Tensor) -> float:
    """``E = mean h²``."""
    flat = h.reshape(-1).to(selection.accumulation_dtype(h.dtype))
    return float(torch.dot(flat, flat)) / len(flat)


def _decide(
    policy: list[float], energy: float, entropy: Tensor | None, r: int
) -> tuple[float, int]:
    """γ and the active rank, as :func:`vps.policy.decide` has them."""
    factor, *bounds = policy
    sigma = -math.expm1(-energy)
    if entropy is not None:
        sigma = max(sigma, min(1.0, float(entropy) / 3))
    sigma = min(1.0, factor * sigma)
    gamma, rank, topk = (
        low + (high - low) * sigma for low, high in zip(bounds[:6:2], bounds[1:6:2], strict=True)
    )
    return gamma, min(r, int(rank + FLOOR_GUARD), int(topk + FLOOR_GUARD))


def _norms(vectors: Tensor, dim: int) -> list[float]:
    dtype = selection.accumulation_dtype(vectors.dtype)
    norms: list[float] = torch.linalg.vector_norm(vectors, 2, dim=dim, dtype=dtype).tolist()
    return norms
