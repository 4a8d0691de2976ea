"""The Triton backend: a GEMV of ours for a few tokens, else cuBLAS and fused kernels (SPEC §2–§5).

Plain selection with component clip and first order, which is the default, runs in kernels alone;
the r × r cores of coupling, spectral clip and second order are built in torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vps import coupling, gradient, torch_backend
from vps.kernels import couple as couple_kernels
from vps.kernels import decode, delta, factors, scores, select
from vps.policy import Settings
from vps.torch_backend import Inputs, Outputs

Decoded = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def decoded(inputs: Inputs, settings: Settings) -> Decoded | None:
    """What :func:`vps.kernels.decode.launch` returns, ``None`` where it does not take the call."""
    if not _is_plain(settings) or inputs.H is not None:
        return None
    if decode.refusal(inputs.x, inputs.weight, settings.r) is not None:
        return None
    return decode.launch(*inputs[:8], settings.r, settings.adaptive, settings.tau, settings.clamp)


def forward(inputs: Inputs, settings: Settings) -> Outputs:
    """Policy first, then the selection and its core, then the update (SPEC §3–§5).

    No result is a view of an argument.
    """
    if (found := decoded(inputs, settings)) is not None:
        y, features, *rest = found
        return Outputs(y, features[:, 0], features[:, 1], *rest)
    x, W, bias, mask, I_in, I_out, numbers, entropy, H, energy = inputs
    plain = _is_plain(settings)
    H = F.linear(x, W) if H is None else H
    s_out = None
    if settings.adaptive:
        if energy is None:
            s_out, energy = scores.launch(H, mask, True)
        elif not plain:
            energy = energy.clone()  # the policy of torch works in place
    I_in = _top_k(x, None, mask, settings.r) if I_in is None else I_in
    I_out = _top_k(H, s_out, mask, settings.r) if I_out is None else I_out
    counted = None if mask is None else mask.any(1)
    t = None
    if not plain:
        B = gradient.columns(W, I_in) if gradient.reads_columns(W, I_in) else None
        core, gamma, t, inactive = torch_backend.build(inputs, H, energy, I_in, I_out, B, settings)
        core, gamma = torch_backend.square(core), gamma.clone()
        active = None if inactive is None else (~inactive).sum(1, dtype=torch.int32)
    else:
        core, gamma, active = factors.launch(
            W, I_in, I_out, numbers, energy, entropy, settings.tau, counted
        )
        if settings.clamp is not None:
            left_out = torch.arange(settings.r, device=H.device) >= active.unsqueeze(-1)
            t = torch_backend.selected(H, I_out).masked_fill_(left_out.unsqueeze(1), 0.0)
    y = delta.launch(H, bias, W, I_in, I_out, core, gamma, active, settings.clamp)
    if counted is not None and not plain:  # where a core may hold NaN
        y = torch.where(counted[:, None, None], y, H if bias is None else H + bias)
    return Outputs(y, I_in, I_out, core, gamma, t)


def _is_plain(settings: Settings) -> bool:
    """Whether kernels alone compute the core."""
    return not (settings.coupled or settings.spectral or settings.second_order)


def couple(
    x: Tensor,
    W_q: Tensor,
    W_k: Tensor,
    mask: Tensor | None,
    I_in: Tensor | None,
    r: int,
    heads: int,
    kv_heads: int,
) -> coupling.Joint:
    """Products and selections of a query and a key projection, see :func:`vps.coupling.couple`."""
    I_in = _top_k(x, None, mask, r) if I_in is None else I_in
    if couple_kernels.refusal(len(W_k), r) is not None:
        return coupling.couple(x, W_q, W_k, mask, I_in, r, heads, kv_heads, scores.launch)
    H_q, H_k = F.linear(x, W_q), F.linear(x, W_k)
    if x.shape[1] == 1:
        counted = None if mask is None else mask[:, 0]
        found = couple_kernels.launch(H_q[:, 0], H_k[:, 0], [], counted, I_in, heads, kv_heads)
    else:
        s_q, energy_q = scores.launch(H_q, mask, True)
        s_k, energy_k = scores.launch(H_k, mask, True)
        energies = [energy_q, energy_k]
        found = couple_kernels.launch(s_q, s_k, energies, None, I_in, heads, kv_heads)
    return coupling.Joint(H_q, H_k, *found)


def pair(
    x: Tensor,
    W_q: Tensor,
    b_q: Tensor | None,
    W_k: Tensor,
    b_k: Tensor | None,
    mask: Tensor | None,
    I_in: Tensor | None,
    policy: Tensor,
    entropy: Tensor | None,
    r: int,
    heads: int,
    kv_heads: int,
    adaptive: bool,
    coupled_q: bool,
    coupled_k: bool,
    second_order: bool,
    alpha: float,
    tau: float | None,
    spectral: bool,
    clamp: float | None,
    policy_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both layers of a query and a key projection, without a gradient, and I_in ``[G, r]``.

    ``policy_k`` is the policy of the key where it has its own.
    """
    others = second_order, alpha, tau, spectral, clamp
    both = (
        (W_q, b_q, policy, Settings(r, adaptive, coupled_q, *others)),
        (W_k, b_k, policy if policy_k is None else policy_k,
         Settings(r, adaptive, coupled_k, *others)),
    )  # fmt: skip
    few = couple_kernels.refusal(len(W_k), r) is None and all(
        _is_plain(settings) and decode.refusal(x, W, r) is None for W, _, _, settings in both
    )
    if not few:
        H_q, H_k, pooled, features = couple(x, W_q, W_k, mask, I_in, r, heads, kv_heads)
        I_in, energy = features[:, 0], pooled if adaptive else None
        y_q, y_k = (
            forward(
                Inputs(x, W, b, mask, I_in, features[:, i], numbers, entropy, H, energy), settings
            ).y
            for i, H, (W, b, numbers, settings) in zip((1, 2), (H_q, H_k), both, strict=True)
        )
        return y_q, y_k, I_in
    I_in = _top_k(x, None, mask, r) if I_in is None else I_in
    products = [
        decode.multiply(x, W, mask, I_in, False, False, tau is not None) for W in (W_q, W_k)
    ]
    counted = None if mask is None else mask[:, 0]
    H_q, H_k = (product.H for product in products)
    pooled, features = couple_kernels.launch(H_q, H_k, [], counted, I_in, heads, kv_heads)
    energy = pooled if adaptive else None
    y_q, y_k = (
        decode.update(
            W, product, b, mask, I_in, features[:, i], energy, numbers, entropy, tau, clamp
        )[0]
        for i, product, (W, b, numbers, _) in zip((1, 2), products, both, strict=True)
    )
    return y_q, y_k, features[:, 0]


def _top_k(values: Tensor, sums: Tensor | None, mask: Tensor | None, r: int) -> Tensor:
    """The r features of values ``[G, T, d]`` with the largest scores; ``sums`` if known."""
    if values.shape[1] == 1:  # where it does not count, what it selects is not used
        return select.launch(values[:, 0], r, absolute=True)
    if sums is None:
        sums, _ = scores.launch(values, mask, False)
    return select.launch(sums, r)
