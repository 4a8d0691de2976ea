"""Run the algorithm as SPEC (docs/specification.md) writes it: dense ``U, V, A = WᵀV, B = WU``.

``y = H + b + γ · clamp((xÃ) B̃ᵀ)`` for every group of tokens (SPEC §1–§5). It is slow on purpose:
the oracle of every other backend and the baseline of the benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

HISTORY = 5
FLOOR_GUARD = 2.0**-20


@dataclass(frozen=True)
class Group:
    """Everything computed for the tokens that share one selection.

    ``tokens`` [n] indexes the flattened input, and ``counted`` [n] says which of these count.
    ``I_in`` and ``I_out`` are the pool of ``topk`` features, best first; the first ``rank`` are
    used. ``scale`` [rank] is ``s_c`` of SPEC §4. ``A`` and ``B`` are before the clip, ``A_clipped``
    and ``B_clipped`` after it. ``core`` [rank, rank] is ``C``: without clamp and L-BFGS δ is
    ``H[:, I_out] C Bᵀ``. ``delta`` [n, d_out] is before γ. A group without a counted token
    has ``rank`` 0 and γ 0.
    """

    tokens: Tensor
    counted: Tensor
    gamma: float
    rank: int
    topk: int
    order: int
    sigma: float
    energy: float
    s_in: Tensor
    s_out: Tensor
    I_in: Tensor
    I_out: Tensor
    U: Tensor
    V: Tensor
    A: Tensor
    B: Tensor
    scale: Tensor
    A_clipped: Tensor
    B_clipped: Tensor
    core: Tensor
    delta: Tensor


@dataclass(frozen=True)
class Projection:
    """One of two coupled layers, with the arguments of :func:`vps_linear`."""

    weight: Tensor
    bias: Tensor | None = None
    gradient: bool = False
    memory: Sequence[tuple[Tensor, Tensor]] = ()
    gamma: float | Sequence[float] | None = None


@dataclass(frozen=True)
class Result:
    """The output ``y`` [..., d_out], ``H`` [N, d_out] without bias, and all groups."""

    y: Tensor
    H: Tensor
    groups: list[Group] = field(default_factory=list)


def vps_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    config: Any,
    mask: Tensor | None = None,
    prompt: Tensor | None = None,
    entropy: float | None = None,
    outcomes: Sequence[bool] = (),
    gradient: bool = False,
    memory: Sequence[tuple[Tensor, Tensor]] = (),
    gamma: float | Sequence[float] | None = None,
) -> Result:
    """Sharpen one linear layer, literally.

    Args:
        x: input, ``[..., d_in]``, floating point.
        weight: frozen weight ``W``, ``[d_out, d_in]``.
        bias: ``[d_out]`` or ``None``; added after everything else was derived from ``H``.
        config: an object with the fields of SPEC §5, such as ``vps.VPSConfig``.
        mask: bool ``[...]`` (x without its last dim); True counts in the statistics.
        prompt: bool ``[...]``, True marks the prompt under ``scope="prompt"``, whose counted tokens
            decide; ``None`` for the whole input.
        entropy: ℋ of the next token in nats, or ``None``.
        outcomes: improvement history, oldest first; the last five are used.
        gradient: whether the layer holds a gradient, which turns ``"hybrid"`` into SC.
        memory: L-BFGS pairs ``(s, y)``, each ``[d_out]``, oldest first; unused if ``lbfgs=False``.
        gamma: γ in place of the config's, of either sign: a number, or one for each column that
            there can be. Numbers for columns scale the columns of ``Ũ`` while γ itself is 1.

    Returns:
        The output and every intermediate.

    Source: SPEC §1–§5 and §8; the paper, algorithms 1, 2, 4 and 5.
    """
    layer = Projection(weight, bias, gradient, memory, gamma)
    return _sharpen_layers(x, (layer,), None, config, mask, prompt, entropy, outcomes)[0]


def held_vps_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    I_in: Tensor,
    I_out: Tensor,
    core: Tensor,
    gamma: float,
    *,
    clamp: float | None = None,
    memory: Sequence[tuple[Tensor, Tensor]] = (),
) -> Tensor:
    """Sharpen later tokens x ``[T, d_in]`` of one sequence by what its prompt decided, literally.

    ``I_in``, ``I_out`` ``[r]``, ``core`` ``[r, r]`` and γ are those of the prompt's :class:`Group`.

    Source: SPEC §11, in the form of §4, which holds with a clamp and L-BFGS too.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    W, C = weight.to(wide), core.to(wide)
    H, B = x.to(wide) @ W.T, W @ one_hot(I_in, W.shape[1], W)
    if memory:
        B = B + 1e-3 * inverse_hessian(memory).to(W) @ B
    bound = math.inf if clamp is None else clamp
    delta = (H[:, I_out] @ C @ B.T).clamp(-bound, bound)
    y = H + gamma * delta
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def coupled_vps_linear(
    x: Tensor,
    query: Projection,
    key: Projection,
    *,
    heads: int,
    kv_heads: int,
    config: Any,
    mask: Tensor | None = None,
    prompt: Tensor | None = None,
    entropy: float | None = None,
    outcomes: Sequence[bool] = (),
) -> tuple[Result, Result]:
    """Sharpen the query and the key projection of one attention block together, literally.

    They share ``I_in`` and one policy decision, from their pooled energy; ``I_out`` ranks channels
    by what they add to the attention logits. Arguments that are not listed are as for
    :func:`vps_linear`, and so are both results.

    Args:
        x: input of both, ``[..., d_in]``.
        query: the query projection, with weight ``[heads * d, d_in]``.
        key: the key projection, with weight ``[kv_heads * d, d_in]``.
        heads: query heads, of d channels each.
        kv_heads: key-value heads; a divisor of ``heads``.

    Source: SPEC §7; the paper, section 7.
    """
    both, numbers = (query, key), (heads, kv_heads)
    first, second = _sharpen_layers(x, both, numbers, config, mask, prompt, entropy, outcomes)
    return first, second


def _sharpen_layers(
    x: Tensor,
    layers: Sequence[Projection],
    heads: tuple[int, int] | None,
    config: Any,
    mask: Tensor | None,
    prompt: Tensor | None,
    entropy: float | None,
    outcomes: Sequence[bool],
) -> list[Result]:
    """Sharpen one layer, or with ``heads`` a query and a key together."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    x2d = x.reshape(-1, x.shape[-1])
    H = [x2d @ p.weight.T for p in layers]
    y = [h.clone() if p.bias is None else h + p.bias for h, p in zip(H, layers, strict=True)]
    counted = torch.ones(len(x2d), dtype=torch.bool) if mask is None else mask.reshape(-1).cpu()
    if prompt is not None and config.scope == "prompt":
        counted = counted & prompt.reshape(-1).cpu()
    counted, groups = counted.to(x.device), [list[Group]() for _ in layers]
    for tokens in group_tokens(x.shape[:-1], config.scope):
        tokens = tokens.to(x.device)
        joint: list[tuple[float, Tensor] | None] = [None] * len(layers)
        if heads is not None:
            values = [clean(h[tokens][counted[tokens]].to(accumulate)) for h in H]
            energy = mean_square(torch.cat(values, dim=1))
            topk = decide(config, energy, entropy, outcomes)[3]
            n = max(1, len(values[0]))
            s_q, s_k = (v.abs().sum(0) / n for v in values)
            pools = couple_heads(s_q, s_k, *heads, min(topk, len(s_k)))
            joint = [(energy, pool) for pool in pools]
        for i, p in enumerate(layers):
            group = _sharpen(
                x2d[tokens].to(accumulate), H[i][tokens].to(accumulate), p, tokens, counted[tokens],
                config, entropy, outcomes, joint[i],
            )  # fmt: skip
            if group.rank:
                y[i][tokens] = (y[i][tokens] + group.gamma * group.delta).to(y[i].dtype)
            groups[i].append(group)
    shape = x.shape[:-1]
    each = zip(y, layers, H, groups, strict=True)
    return [Result(own.reshape(*shape, len(p.weight)), h, found) for own, p, h, found in each]


def couple_heads(
    s_q: Tensor, s_k: Tensor, heads: int, kv_heads: int, k: int
) -> tuple[Tensor, Tensor]:
    """Return the best k output features of query and key, by ``c[g, j]`` and ``h*`` of SPEC §7."""
    query = s_q.double().view(kv_heads, heads // kv_heads, -1)
    size = query.shape[-1]
    c = query.sum(1) * s_k.double().view(kv_heads, size)
    pool_q, pool_k = [], []
    for index in top_k(c.flatten(), k).tolist():
        g, j = divmod(index, size)
        h = g * (heads // kv_heads) + int(top_k(query[g, :, j], 1))
        pool_q.append(h * size + j)
        pool_k.append(index)
    return torch.tensor(pool_q, device=s_q.device), torch.tensor(pool_k, device=s_q.device)


def group_tokens(shape: Sequence[int], scope: str) -> list[Tensor]:
    """Return the flat token indices of each group, for token dims ``shape`` (SPEC §2, scope)."""
    tokens = torch.arange(math.prod(shape))
    if scope == "token":
        return list(tokens.split(1)) if len(tokens) else []
    if scope == "batch" or len(shape) < 2:
        return [tokens] if len(tokens) else []
    return list(tokens.split(shape[-1])) if len(tokens) else []


def clean(values: Tensor) -> Tensor:
    """Return ``values`` with every non-finite element set to 0 (SPEC §2)."""
    return torch.where(torch.isfinite(values), values, torch.zeros_like(values))


def mean_square(values: Tensor) -> float:
    """Return the energy ``E`` of cleaned values ``[n, d]``, 0 when there are none (SPEC §2)."""
    return float((values.detach() ** 2).sum() / max(1, values.numel()))


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return the ``k`` indices of the largest scores, best first, ties to the lower (SPEC §3)."""
    return torch.sort(scores, descending=True, stable=True).indices[:k]


def _sharpen(
    x: Tensor,
    H: Tensor,
    layer: Projection,
    tokens: Tensor,
    counted: Tensor,
    config: Any,
    entropy: float | None,
    outcomes: Sequence[bool],
    joint: tuple[float, Tensor] | None = None,
) -> Group:
    """Compute one group; ``joint`` holds energy and output pool where a coupling decides them."""
    W, own_gamma = layer.weight.to(x.dtype), layer.gamma
    memory = layer.memory if config.lbfgs else ()
    d_out, d_in = W.shape
    x_counted, H_counted = clean(x[counted]), clean(H[counted])
    n = max(1, len(x_counted))
    s_in, s_out = x_counted.abs().sum(0) / n, H_counted.abs().sum(0) / n
    energy = mean_square(H_counted) if joint is None else joint[0]

    sigma, rank, gamma, topk, order = decide(config, energy, entropy, outcomes)
    columns: Sequence[float] | None = None
    if isinstance(own_gamma, (int, float)):
        gamma = float(own_gamma)
    elif own_gamma is not None:
        gamma, columns = 1.0, own_gamma
    k_in, k_out = min(topk, d_in), min(topk, d_out) if joint is None else len(joint[1])
    r = min(rank, k_in, k_out)
    if not bool(counted.any()):
        r, gamma = 0, 0.0

    if config.builder == "random":
        generator = torch.Generator().manual_seed(config.seed)
        I_in = torch.randperm(d_in, generator=generator)[:k_in].to(x.device)
        I_out = torch.randperm(d_out, generator=generator)[:k_out].to(x.device)
    else:
        I_in = top_k(s_in, k_in)
        I_out = top_k(s_out, k_out) if joint is None else joint[1]
    U, V = one_hot(I_in[:r], d_in, W), one_hot(I_out[:r], d_out, W)
    if config.builder == "sc" or (config.builder == "hybrid" and layer.gradient):
        V = couple(V, x_counted[:, I_in[:r]], H_counted[:, I_out[:r]], config.alpha)

    A, B = W.T @ V, W @ U
    scale = clip_scale(A, B, config.tau, config.clip)
    A_clipped, B_clipped = A / scale.sqrt(), B / scale.sqrt()
    B_own = B_clipped if columns is None else B_clipped * W.new_tensor(list(columns)[:r])
    B_used = B_own
    if memory:
        B_used = B_own + 1e-3 * inverse_hessian(memory).to(W) @ B_own
    t, series = x @ A_clipped, torch.eye(r, dtype=W.dtype, device=W.device)
    if order == 2:
        M = (V / scale.sqrt()).T @ B_own
        series = series + (gamma / 2) * M.T
        t = t @ series
    delta = t @ B_used.T
    core = (V / scale.sqrt())[I_out[:r]] @ series / scale.sqrt()
    if columns is not None:
        core = core * W.new_tensor(list(columns)[:r])
    if config.clamp is not None:
        delta = delta.clamp(-config.clamp, config.clamp)
    return Group(
        tokens, counted, gamma, r, topk, order, sigma, energy, s_in, s_out,
        I_in, I_out, U, V, A, B, scale, A_clipped, B_clipped, core, delta,
    )  # fmt: skip


def decide(
    config: Any, energy: float, entropy: float | None, outcomes: Sequence[bool]
) -> tuple[float, int, float, int, int]:
    """Return ``(σ, rank, γ, topk, order)`` of one group, in the order of SPEC §5."""
    sigma = -math.expm1(-energy)
    if entropy is not None:
        sigma = max(sigma, min(1.0, entropy / 3))
    recent = list(outcomes)[-HISTORY:]
    if recent and sum(recent) / len(recent) >= 3 / 5:
        sigma = min(1.0, 1.3 * sigma)
    elif len(recent) == HISTORY and not any(recent):
        sigma = 0.7 * sigma

    def floor(name: str) -> int:
        low, high = getattr(config, f"{name}_bounds")
        return low + math.floor((high - low) * sigma + FLOOR_GUARD)

    low, high = config.gamma_bounds
    return (
        sigma,
        floor("rank") if config.adaptive_rank else config.rank,
        low + (high - low) * sigma if config.adaptive_gamma else config.gamma,
        floor("topk") if config.adaptive_topk else config.topk,
        floor("order") if config.adaptive_order else config.order,
    )


def one_hot(indices: Tensor, size: int, like: Tensor) -> Tensor:
    """Return the selector ``[size, r]`` whose column c is 1 at ``indices[c]``."""
    selector = torch.zeros(size, len(indices), dtype=like.dtype, device=like.device)
    selector[indices, torch.arange(len(indices), device=like.device)] = 1
    return selector


def couple(V: Tensor, X_A: Tensor, Y: Tensor, alpha: float) -> Tensor:
    """Return ``Ṽ = V Tᵀ`` with columns of norm 1 or 0, ``T = (X_AᵀX_A + αI)⁻¹ X_AᵀY`` (SPEC §3).

    It is solved in float64, because float32 loses α beside the square of an outlier feature.
    """
    X, Y = X_A.double(), Y.double()
    ridge = alpha * torch.eye(min(X.shape), dtype=X.dtype, device=X.device)
    if len(X) < X.shape[1]:  # the same T, without a matrix that only α keeps from being singular
        T = X.T @ torch.linalg.solve(X @ X.T + ridge, Y)
    else:
        T = torch.linalg.solve(X.T @ X + ridge, X.T @ Y)
    mixed = V.double() @ T.T
    norm = mixed.norm(dim=0)
    return torch.where(norm > 0, mixed / norm, torch.zeros_like(mixed)).to(V.dtype)


def clip_scale(A: Tensor, B: Tensor, tau: float | None, clip: str) -> Tensor:
    """Return ``s`` [r]; the clip divides both factors by its root (SPEC §4)."""
    if tau is None or not A.shape[1]:
        return A.new_ones(A.shape[1])
    if clip == "component":
        return (A.norm(dim=0) * B.norm(dim=0) / tau).clamp(min=1)
    norm = torch.linalg.matrix_norm(A @ B.T, ord=2)
    return (norm / tau).clamp(min=1).expand(A.shape[1])


def inverse_hessian(memory: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return ``H_k`` [d_out, d_out] by one BFGS update for each pair, oldest first (SPEC §8).

    ``H ← (I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ`` with ``ρ = 1/sᵀy``, starting from
    ``H₀ = (sᵀy)/(yᵀy) I`` of the newest pair.
    """
    s, y = memory[-1]
    one = torch.eye(len(s), dtype=s.dtype, device=s.device)
    H = (s @ y) / (y @ y) * one
    for s, y in memory:
        rho = 1 / (s @ y)
        H = (one - rho * s.outer(y)) @ H @ (one - rho * y.outer(s)) + rho * s.outer(s)
    return H
