"""The Triton backend: a GEMV of ours for a few tokens, else cuBLAS and fused kernels (SPEC §2–§5).

Plain selection with component clip and first order, which is the default, runs in kernels alone;
the r × r cores of coupling, spectral clip and second order are built in torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vps import coupling, gradient, torch_backend
from vps.kernels import decode, delta, factors, scores, select
from vps.policy import Settings
from vps.torch_backend import Inputs, Outputs


def forward(inputs: Inputs, settings: Settings) -> Outputs:
    """Policy first, then the selection and its core, then the update (SPEC §3–§5)."""
    x, W, bias, mask, I_in, I_out, numbers, entropy, H, energy = inputs
    plain = not (settings.coupled or settings.spectral or settings.second_order)
    # The bits of our GEMV are not those of the base layer, which masked-out tokens are promised.
    if plain and mask is None and H is None and decode.refusal(x, W, settings.r) is None:
        y, features, core, gamma, selected = decode.launch(
            *inputs[:8], settings.r, settings.adaptive, settings.tau, settings.clamp
        )
        return Outputs(y, features[:, 0], features[:, 1], core, gamma, selected)
    H = F.linear(x, W) if H is None else H
    s_out = None
    if settings.adaptive:
        if energy is None:
            s_out, energy = scores.launch(H, mask, True)
        else:
            energy = energy.clone()  # the policy works in place
    I_in = _top_k(x, None, mask, settings.r) if I_in is None else I_in
    I_out = _top_k(H, s_out, mask, settings.r) if I_out is None else I_out
    counted = None if mask is None else mask.any(1)
    t = None
    if not plain:
        B = gradient.columns(W, I_in) if gradient.reads_columns(W, I_in) else None
        core, gamma, t, inactive = torch_backend.build(inputs, H, energy, I_in, I_out, B, settings)
        core = torch_backend.square(core)
        active = None if inactive is None else (~inactive).sum(1, dtype=torch.int32)
    else:
        core, gamma, active = factors.launch(
            W, I_in, I_out, numbers, energy, entropy, settings.tau, counted
        )
        if settings.clamp is not None:
            left_out = torch.arange(settings.r, device=H.device) >= active.unsqueeze(-1)
            t = torch_backend.selected(H, I_out).masked_fill_(left_out.unsqueeze(1), 0.0)
    y = delta.launch(H, bias, W, I_in, I_out, core, gamma, active, settings.clamp)
    if counted is not None:  # a group without a counted token keeps the bits of the base layer
        y = torch.where(counted[:, None, None], y, F.linear(x, W, bias) if bias is not None else H)
    return Outputs(y, I_in, I_out, core, gamma, t)


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
    return coupling.couple(x, W_q, W_k, mask, I_in, r, heads, kv_heads, scores.launch)


def _top_k(values: Tensor, sums: Tensor | None, mask: Tensor | None, r: int) -> Tensor:
    """The r features of values ``[G, T, d]`` with the largest scores; ``sums`` if known."""
    if values.shape[1] == 1 and mask is None:
        return select.launch(values[:, 0], r, absolute=True)
    if sums is None:
        sums, _ = scores.launch(values, mask, False)
    return select.launch(sums, r)
