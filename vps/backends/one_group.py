"""One group of tokens on a CPU in few torch calls, for the torch backend (SPEC §2–§5 and §7).

A call of torch costs as much as the work itself where a token is decoded. On a CPU a number may be
read without waiting for a device, so what depends on r numbers alone is worked out in Python.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vps.algorithm import selection
from vps.algorithm.policy import FLOOR_GUARD, NUMBERS, Settings
from vps.algorithm.torch_backend import Inputs, needs_gradient
from vps.backends import column_sums, threads

WIDE = (torch.float32, torch.float64)  # dtypes in which sums may be taken
# Calls of torch inside keep no record of gradients, views and versions: a fifth of their time.
untracked = torch._C._AutoDispatchBelowADInplaceOrView
# Elements of W from which it pays to wake the other threads, which may be asleep or spinning.
SPLIT = 2**19 if threads.ASLEEP else 2**18


def sharpen(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor] | None:
    """Output ``[1, T, d_out]`` and ``I_in`` ``[1, r]``, without a gradient.

    ``None`` where the call is not of this kind (eager, one group whose tokens all count, plain
    selection, component clip and first order) or a statistic is not finite.
    """
    if not _is_one(inputs) or not _is_plain(settings) or needs_gradient(inputs):
        return None
    with untracked():
        return _sharpen(inputs, settings)


def sharpen_pair(
    query: Inputs, key: Inputs, settings: Settings, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Both outputs and ``I_in`` of two projections of one x that select together (SPEC §7).

    ``None`` as for :func:`sharpen`.
    """
    if not _is_one(query) or not _is_plain(settings):
        return None
    if needs_gradient(query) or needs_gradient(key):
        return None
    with untracked():
        return _sharpen_pair(query, key, settings, heads, kv_heads)


def _sharpen(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor] | None:
    x, W, bias, _, I_in, I_out, policy, entropy, H, pooled = inputs
    known = H is not None  # and stays as it is
    H = _product(x, W) if H is None else H
    h = _values(H)
    best_in = _best(_scores(_values(x)), settings.r) if I_in is None else I_in[0]
    best_out = _best(_scores(h), settings.r) if I_out is None else I_out[0]
    energy = 0.0
    if settings.adaptive:
        energy = _energy(h) if pooled is None else float(pooled)
    if best_in is None or best_out is None or not math.isfinite(energy):
        return None
    scale = _decide(policy.tolist(), energy, entropy, settings.r)
    chosen = _as_result(best_in, settings.r) if I_in is None else I_in
    if not any(scale):  # γ = 0 keeps the bits of the base layer
        return F.linear(x, W, bias), chosen
    y = H.clone() if known else H
    _add(_values(y), W, best_in, best_out, scale, settings.tau)
    return (y if bias is None else y.add_(bias)), chosen


def _sharpen_pair(
    query: Inputs, key: Inputs, settings: Settings, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    x, W_q, b_q, _, I_in, _, policy, entropy = query[:8]
    W_k, b_k = key.weight, key.bias
    H_q, H_k = _product(x, W_q), _product(x, W_k)
    q, k = _values(H_q), _values(H_k)
    d_q, d_k = W_q.shape[0], W_k.shape[0]
    energy = (_energy(q) * d_q + _energy(k) * d_k) / (d_q + d_k)
    best_in = _best(_scores(_values(x)), settings.r) if I_in is None else I_in[0]
    if best_in is None or not math.isfinite(energy):
        return None
    numbers = policy.tolist()
    scale_q = scale_k = _decide(numbers, energy, entropy, settings.r)
    if key.policy is not policy:
        scale_k = _decide(key.policy.tolist(), energy, entropy, settings.r)
    active = max(len(scale_q), len(scale_k))
    joint = _joint(_scores(q), _scores(k), active, heads, kv_heads)
    if joint is None:
        return None
    _add(q, W_q, best_in, joint[0], scale_q, settings.tau)
    _add(k, W_k, best_in, joint[1], scale_k, settings.tau)
    y_q = H_q if b_q is None else H_q.add_(b_q)
    y_k = H_k if b_k is None else H_k.add_(b_k)
    return (
        y_q if any(scale_q) else F.linear(x, W_q, b_q),  # γ = 0 keeps the bits of the base layer
        y_k if any(scale_k) else F.linear(x, W_k, b_k),
        _as_result(best_in, settings.r) if I_in is None else I_in,
    )


def _is_one(inputs: Inputs) -> bool:
    x = inputs.x
    return x.shape[0] == 1 and inputs.mask is None and selection.is_read_freely(x)


def _is_plain(settings: Settings) -> bool:
    return settings.clamp is None and not (
        settings.coupled or settings.second_order or settings.spectral
    )


def _product(x: Tensor, W: Tensor) -> Tensor:
    """``H`` ``[1, T, d_out]`` for x ``[1, T, d_in]``.

    MKL multiplies one float32 row on one thread alone, but the matrices of a batch on all: here
    they are blocks of rows of W.
    """
    if x.shape[1] == 1 and W.numel() >= SPLIT and _runs_on_one_thread(W):
        d_out, d_in = W.shape
        blocks = math.gcd(d_out, torch.get_num_threads())
        if blocks > 1:
            rows = W.view(blocks, -1, d_in).mT
            return torch.bmm(x.expand(blocks, 1, d_in), rows).view(1, 1, d_out)
    return F.linear(x, W)


def _runs_on_one_thread(W: Tensor) -> bool:
    return W.dtype == torch.float32 and W.is_contiguous() and torch.backends.mkl.is_available()


def _values(group: Tensor) -> Tensor:
    """``[T, d]`` of ``[1, T, d]``, or ``[d]`` where T is 1."""
    return group.view(-1) if group.shape[1] == 1 and group.is_contiguous() else group.select(0, 0)


def _scores(values: Tensor) -> Tensor:
    """Sum of |values| over the tokens, ``[d]``, in the accumulation dtype where there are some."""
    if values.dim() == 1:
        return values.abs()
    return column_sums.of_absolute(values, selection.accumulation_dtype(values.dtype))


def _best(scores: Tensor, r: int) -> Tensor | None:
    """Indices of the r largest of scores ``[d]`` and perhaps one more, ties to the lower; ``None``
    where not finite.
    """
    best, index = scores.topk(min(r + 1, scores.shape[0]))
    ranked = best.tolist()
    if not math.isfinite(ranked[0]):  # NaN, too, sorts first
        return None
    if len(set(ranked)) == len(ranked):
        return index
    return selection.top_k(scores.to(selection.accumulation_dtype(scores.dtype)), r)


def _as_result(index: Tensor, r: int) -> Tensor:
    """``I_in`` ``[1, r]`` of what :func:`_best` found."""
    return index.as_strided((1, r), (r, 1))


def _joint(
    s_q: Tensor, s_k: Tensor, r: int, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor] | None:
    """The first r of ``I_out`` of the query and of the key, from scores ``[d_q]`` and ``[d_k]``, as
    :func:`vps.algorithm.coupling.select`; ``None`` where not finite.
    """
    size, share = s_k.shape[0] // kv_heads, heads // kv_heads
    queries = s_q.double().view(kv_heads, share, size)
    I_k = _best(queries.sum(1).view(-1).mul_(s_k), r)
    if I_k is None:
        return None
    chosen = I_k.tolist()[:r]
    places = [divmod(j, size) for j in chosen]
    ways = [  # scores of the query channels that a key channel meets
        s_q.as_strided((share,), (size,), g * share * size + channel).tolist()
        for g, channel in places
    ]
    I_q = [
        (g * share + own.index(max(own))) * size + channel
        for (g, channel), own in zip(places, ways, strict=True)
    ]
    return torch.tensor(I_q), torch.tensor(chosen)


def _energy(values: Tensor) -> float:
    """``E``, the mean square; infinite or NaN where an element is."""
    return selection.sum_of_squares(values) / values.numel()


def _decide(policy: list[float], energy: float, entropy: Tensor | None, r: int) -> list[float]:
    """γ of each active column, as :func:`vps.algorithm.policy.decide` has it."""
    factor, g_low, g_high, r_low, r_high, k_low, k_high = policy[:7]
    sigma = -math.expm1(-energy)
    if entropy is not None:
        sigma = max(sigma, min(1.0, float(entropy) / 3))
    sigma = min(1.0, factor * sigma)
    rank = int(r_low + (r_high - r_low) * sigma + FLOOR_GUARD)
    topk = int(k_low + (k_high - k_low) * sigma + FLOOR_GUARD)
    gamma, active = g_low + (g_high - g_low) * sigma, min(r, rank, topk)
    if len(policy) > NUMBERS:
        return [gamma * own for own in policy[NUMBERS:][:active]]
    return [gamma] * active


def _add(
    h: Tensor, W: Tensor, I_in: Tensor, I_out: Tensor, scale: list[float], tau: float | None
) -> None:
    """Add ``h[:, I_out] C Bᵀ`` to h ``[T, d_out]`` or ``[d_out]``, C being ``scale`` after the clip
    by ``tau``.

    ``scale`` is of the active columns, the first of both selections ``[r]``.
    """
    if h.dtype in WIDE:
        add = _add_to_row if h.dim() == 1 else _add_columns
        add(h, W, I_in, I_out, scale, tau)
        return
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


def _add_columns(
    h: Tensor, W: Tensor, I_in: Tensor, I_out: Tensor, scale: list[float], tau: float | None
) -> None:
    """As :func:`_add`, a column of W after the other: faster than a product of so few.

    The first call of each kind is the dear one after a large product, which leaves none of torch
    in the caches; so there are few kinds.
    """
    chosen = I_out.tolist()[: len(scale)]
    parts = [h.select(1, j).clone() for j in chosen]  # before a column is added
    for i, j, t, own in zip(I_in.tolist(), chosen, parts, scale, strict=False):
        column = W.select(1, i).clone()
        if tau is not None:
            norms = [torch.linalg.vector_norm(v).tolist() for v in (W.select(0, j), column)]
            own /= max(1.0, norms[0] * norms[1] / tau)
        h.addcmul_(t.unsqueeze(1), column, value=own)


def _add_to_row(
    h: Tensor, W: Tensor, I_in: Tensor, I_out: Tensor, scale: list[float], tau: float | None
) -> None:
    """As :func:`_add` for h ``[d_out]``."""
    t = h.index_select(0, I_out).tolist()
    for i, j, own_t, own in zip(I_in.tolist(), I_out.tolist(), t, scale, strict=False):
        column = W.select(1, i)
        if tau is not None:
            row = W.select(0, j)
            square = torch.dot(row, row).item() * torch.dot(column, column).item()
            own /= max(1.0, math.sqrt(square) / tau)
        h.add_(column, alpha=own * own_t)
