"""The torch backend: the flow of :mod:`vps.algorithm.flow`, for every kind of weight and call.

One group of tokens on a CPU goes a shorter way where it is of the plainest kind. A call of torch
costs as much as the work itself where a token is decoded: a LLaMA of SmolLM2's shape takes 2.9
times the time of the plain model by the flow, and 1.6 times by the fewer calls here (2 AVX-512
cores, float32). On a CPU a number may be read without waiting for a device, so what depends on r
numbers is worked out in Python.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vps.algorithm import fixed, flow, selection, tracing
from vps.algorithm.core import Core
from vps.algorithm.flow import Given, Layer
from vps.algorithm.policy import FLOOR_GUARD, NUMBERS, Settings
from vps.algorithm.weight import Matrix
from vps.backends.call import Call, Inputs, Kind, Outputs, Result, needs_gradient

WIDE = (torch.float32, torch.float64)  # dtypes in which sums may be taken
# Inside, torch records no gradients, views and versions, which saves a fifth of the time of calls.
untracked = torch._C._AutoDispatchBelowADInplaceOrView
# From so many elements of W it pays to wake the other threads, which may be asleep or spinning.
SPLIT = 2**19 if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" else 2**18


def why_missing() -> None:
    """Return ``None``: torch runs everywhere."""


def why_not(kind: Kind) -> None:
    """Return ``None``: torch takes every call."""


def run(call: Call) -> Result:
    """Run a call; autograd gives its gradient."""
    if call.given.core is not None and edits(call):
        return _edited(call)
    if _is_short(call):
        with untracked():
            found = _one(call) if call.heads is None else _pair(call, call.heads)
        if found is not None:
            return found
    try:
        outcomes, I_in = flow.sharpen(
            call.x, call.layers, call.mask, call.entropy, call.heads, call.given,
            wants_rows=call.held is not None and call.layers[0].settings.clamp is None,
        )  # fmt: skip
        for layer, out in zip(call.layers, outcomes, strict=True):
            call.hold(layer, I_in, out.I_out, out.core, out.rows)
    finally:
        for layer in call.layers:
            layer.weight.release()
    return [outcome.y for outcome in outcomes], I_in


def forward(inputs: Inputs, settings: Settings) -> Outputs:
    """Compute one layer whose weight is a matrix, with the constants of its backward pass."""
    x, W, bias, mask, I_in, I_out, numbers, entropy, H, energy = inputs
    layer = Layer(Matrix(W), bias, settings, numbers)
    known = None if H is None else (H,)
    (out,), I_in = flow.sharpen(
        x, (layer,), mask, entropy, given=Given(I_in, I_out, energy), products=known
    )
    assert out.y is not None and out.core is not None
    return Outputs(out.y, I_in, out.I_out, out.core.matrix, out.core.gamma, out.t)


def edits(call: Call, rounds: bool = True) -> bool:
    """Return whether a fixed update of a call can change x before the layer's own product.

    A clamp and L-BFGS need δ itself, and the gradient of W must not see the change. ``rounds`` says
    that ``x + e`` is rounded to the dtype of x. In 16 bits that shows where large features cancel
    each other in y, so a matrix then takes the form of SPEC §4.
    """
    layer = call.layers[0]
    if rounds and call.x.element_size() == 2 and isinstance(layer.weight, Matrix):
        return False
    if call.given.through is None or layer.pairs or layer.settings.clamp is not None:
        return False
    if not torch.is_grad_enabled():
        return True
    return not tracing.is_transforming() and not any(
        one.requires_grad for one in layer.weight.parameters()
    )


def _edited(call: Call) -> Result:
    (layer,), given = call.layers, call.given
    assert given.I_in is not None and given.edit is not None
    try:
        x = fixed.edited(call.x, *given.edit)
        return [layer.weight.plain(x, layer.bias)], given.I_in
    finally:
        layer.weight.release()


def later(given: Given, x: Tensor) -> tuple[Any, tuple[Tensor, ...]] | None:
    """Return the function of x, W, b and these arguments that computes a later token."""
    if given.edit is None or x.element_size() == 2:
        return None
    return _later, given.edit


def _later(x: Tensor, W: Tensor, b: Tensor | None, index: Tensor, across: Tensor) -> Tensor:
    return F.linear(x.scatter_add(-1, index, torch.bmm(x, across)), W, b)


def _is_short(call: Call) -> bool:
    """Return whether a call is of the plainest kind.

    It is eager, has one group whose tokens all count, and needs plain selection, component clip and
    first order, no clamp and no gradient.
    """
    x, first = call.x, call.layers[0].settings
    if call.given.core is not None:
        return False
    if x.shape[0] != 1 or call.mask is not None or not selection.is_read_freely(x):
        return False
    for at, layer in enumerate(call.layers):
        if not isinstance(layer.weight, Matrix) or layer.pairs or layer.settings != first:
            return False
        if not first.is_plain or first.clamp is not None or needs_gradient(call.inputs(at)):
            return False
    return True


def _one(call: Call) -> Result | None:
    """Return y ``[1, T, d_out]`` and ``I_in`` ``[1, r]``, or ``None`` if a number is not finite."""
    settings = call.layers[0].settings
    x, W, bias, _, I_in, I_out, policy, entropy, _, pooled = call.inputs()
    y = _product(x, W)
    h = _values(y)
    best_in = _best(_scores(_values(x)), settings.r) if I_in is None else I_in[0]
    best_out = _best(_scores(h), settings.r) if I_out is None else I_out[0]
    energy = 0.0
    if settings.adaptive:
        energy = _energy(h) if pooled is None else float(pooled)
    if best_in is None or best_out is None or not math.isfinite(energy):
        return None
    gamma, scale = _decide(policy.tolist(), energy, entropy, settings.r)
    chosen = _as_result(best_in, settings.r) if I_in is None else I_in
    if any(scale):
        scale = _add(h, W, best_in, best_out, scale, settings.tau)
        y = y if bias is None else y.add_(bias)
    else:  # γ = 0 keeps the bits of the base layer
        y = F.linear(x, W, bias)
    _hold(call, 0, chosen, best_out, gamma, scale)
    return [y], chosen


def _pair(call: Call, heads: tuple[int, int]) -> Result | None:
    """Return both outputs of a query and a key, as :func:`_one` does for one layer."""
    settings, I_in, entropy, x = call.layers[0].settings, call.given.I_in, call.entropy, call.x
    products = [_product(x, call.inputs(at).weight) for at in (0, 1)]
    q, k = (_values(H) for H in products)
    d_q, d_k = products[0].shape[-1], products[1].shape[-1]
    energy = (_energy(q) * d_q + _energy(k) * d_k) / (d_q + d_k)
    best_in = _best(_scores(_values(x)), settings.r) if I_in is None else I_in[0]
    if best_in is None or not math.isfinite(energy):
        return None
    decided = [_decide(own.numbers.tolist(), energy, entropy, settings.r) for own in call.layers]
    wanted = max(len(scale) for _, scale in decided) if call.held is None else settings.r
    joint = _joint(_scores(q), _scores(k), wanted, *heads)
    if joint is None:
        return None
    chosen = _as_result(best_in, settings.r) if I_in is None else I_in
    ys: list[Tensor | None] = []
    for at, (y, values, I_out, (gamma, scale)) in enumerate(
        zip(products, (q, k), joint, decided, strict=True)
    ):
        W, bias = call.inputs(at)[1:3]
        if call.layers[at].is_plain:
            ys.append(None)
        elif any(scale):
            scale = _add(values, W, best_in, I_out, scale, settings.tau)
            ys.append(y if bias is None else y.add_(bias))
        else:  # γ = 0 keeps the bits of the base layer
            ys.append(F.linear(x, W, bias))
        _hold(call, at, chosen, I_out, gamma, scale)
    return ys, chosen


def _hold(
    call: Call, at: int, I_in: Tensor, I_out: Tensor, gamma: float, scale: list[float]
) -> None:
    """Hold what was decided for a layer of one group: ``scale`` is γ times the diagonal of C."""
    if call.held is None:
        return
    layer, r = call.layers[at], call.layers[at].settings.r
    if layer.is_plain:
        call.held.append(None)
        return
    W = call.inputs(at).weight
    I_out, dtype = I_out[:r], selection.accumulation_dtype(W.dtype)
    factors = torch.tensor([*scale, *[0.0] * (r - len(scale))], dtype=dtype)
    through = (W.index_select(0, I_out) * factors.unsqueeze(1)).to(W.dtype).unsqueeze(0)
    matrix = factors.div(gamma) if gamma else factors
    core = Core(matrix.view(1, 1, r), torch.tensor([gamma], dtype=dtype), None)
    chosen = fixed.own_memory(I_in), fixed.own_memory(I_out.unsqueeze(0))
    call.held.append(fixed.FixedUpdate(*chosen, core, through))


def _product(x: Tensor, W: Tensor) -> Tensor:
    """Return ``H`` ``[1, T, d_out]`` for x ``[1, T, d_in]``.

    MKL multiplies a single float32 row on one thread, but the matrices of a batch on all threads;
    so blocks of rows of W become a batch.
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
    """Return ``[T, d]`` for ``[1, T, d]``, or ``[d]`` if T is 1."""
    return group.view(-1) if group.shape[1] == 1 and group.is_contiguous() else group.select(0, 0)


def _scores(values: Tensor) -> Tensor:
    """Return the sum of |values| over the tokens, ``[d]``; several are summed in a wide dtype."""
    if values.dim() == 1:
        return values.abs()
    return values.abs().sum(0, dtype=selection.accumulation_dtype(values.dtype))


def _best(scores: Tensor, r: int) -> Tensor | None:
    """Return the indices of the r largest scores ``[d]``, ties to the lower, and perhaps one more.

    ``None`` if a score is not finite.
    """
    best, index = scores.topk(min(r + 1, scores.shape[0]))
    ranked = best.tolist()
    if not math.isfinite(ranked[0]):  # NaN, too, sorts first
        return None
    if len(set(ranked)) == len(ranked):
        return index
    return selection.top_k(scores.to(selection.accumulation_dtype(scores.dtype)), r)


def _as_result(index: Tensor, r: int) -> Tensor:
    """Return ``I_in`` ``[1, r]`` from the result of :func:`_best`."""
    return index.as_strided((1, r), (r, 1))


def _joint(
    s_q: Tensor, s_k: Tensor, r: int, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor] | None:
    """Select ``I_out`` of query and key as :func:`vps.algorithm.coupling.select` does.

    The scores are ``[d_q]`` and ``[d_k]``. ``None`` if a score is not finite.
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
    """Return ``E``, the mean square, which is inf or NaN if an element is."""
    return selection.sum_of_squares(values) / values.numel()


def _decide(
    policy: list[float], energy: float, entropy: Tensor | None, r: int
) -> tuple[float, list[float]]:
    """Return γ, and γ of each active column, as :func:`vps.algorithm.policy.decide` chooses it."""
    factor, g_low, g_high, r_low, r_high, k_low, k_high = policy[:7]
    sigma = -math.expm1(-energy)
    if entropy is not None:
        nats, own = entropy.tolist()
        sigma, factor = max(sigma, min(1.0, nats / 3)), factor * own
    sigma = min(1.0, factor * sigma)
    rank = int(r_low + (r_high - r_low) * sigma + FLOOR_GUARD)
    topk = int(k_low + (k_high - k_low) * sigma + FLOOR_GUARD)
    gamma, active = g_low + (g_high - g_low) * sigma, min(r, rank, topk)
    if len(policy) > NUMBERS:
        return gamma, [gamma * own for own in policy[NUMBERS:][:active]]
    return gamma, [gamma] * active


def _add(
    h: Tensor, W: Tensor, I_in: Tensor, I_out: Tensor, scale: list[float], tau: float | None
) -> list[float]:
    """Add ``h[:, I_out] C Bᵀ`` to h ``[T, d_out]`` or ``[d_out]``; return the diagonal of C.

    C is ``scale`` after the clip by ``tau``. ``scale`` has a number for each active column; these
    are the first columns of both selections ``[r]``.
    """
    if h.dtype in WIDE:
        add = _add_to_row if h.dim() == 1 else _add_columns
        return add(h, W, I_in, I_out, scale, tau)
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
    return scale


def _add_columns(
    h: Tensor, W: Tensor, I_in: Tensor, I_out: Tensor, scale: list[float], tau: float | None
) -> list[float]:
    """Add as :func:`_add` does, one column of W after another, which beats a product of so few.

    A large matrix product evicts torch's code from the caches, so the first call of each torch
    function after it is slow; so few functions are used here.
    """
    chosen = I_out.tolist()[: len(scale)]
    parts = [h.select(1, j).clone() for j in chosen]  # before a column is added
    clipped = []
    for i, j, t, own in zip(I_in.tolist(), chosen, parts, scale, strict=False):
        column = W.select(1, i).clone()
        if tau is not None:
            norms = [torch.linalg.vector_norm(v).tolist() for v in (W.select(0, j), column)]
            own /= max(1.0, norms[0] * norms[1] / tau)
        h.addcmul_(t.unsqueeze(1), column, value=own)
        clipped.append(own)
    return clipped


def _add_to_row(
    h: Tensor, W: Tensor, I_in: Tensor, I_out: Tensor, scale: list[float], tau: float | None
) -> list[float]:
    """Add as :func:`_add` does, for h ``[d_out]``."""
    t, clipped = h.index_select(0, I_out).tolist(), []
    for i, j, own_t, own in zip(I_in.tolist(), I_out.tolist(), t, scale, strict=False):
        column = W.select(1, i)
        if tau is not None:
            row = W.select(0, j)
            square = torch.dot(row, row).item() * torch.dot(column, column).item()
            own /= max(1.0, math.sqrt(square) / tau)
        h.add_(column, alpha=own * own_t)
        clipped.append(own)
    return clipped
