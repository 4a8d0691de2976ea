"""Compute by Triton: by a GEMV for a few tokens, else by cuBLAS and fused kernels (SPEC §2–§5).

Kernels do all but the base product, up to r = 8. Beyond, the r × r cores of coupling, spectral clip
and second order are built in torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vps.algorithm import core as cores
from vps.algorithm import coupling, gradient
from vps.algorithm.policy import Settings
from vps.algorithm.weight import matrix_products
from vps.backends.call import Call, Inputs, Outputs, Result
from vps.kernels import columns as gathered
from vps.kernels import scores, select
from vps.kernels.columns import Columns
from vps.kernels.decode import again, decode
from vps.kernels.decode import couple as couple_kernels
from vps.kernels.prefill import core as core_kernels
from vps.kernels.prefill import delta, factors, features

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_tuple: Any = tuple.__new__  # of a NamedTuple, without a call of its own


def linear(inputs: Inputs, settings: Settings, columns: Columns | None = None) -> Results:
    """Compute what ``vps::linear`` returns; no result is a view of an argument (SPEC §3–§5).

    ``columns`` are those of the weight at I_in, where they were gathered with H.
    """
    if _decodes(inputs, settings):
        return decode.launch(
            inputs.x, [_layer(inputs)], inputs.mask, inputs.I_in,
            None if inputs.I_out is None else inputs.I_out.unsqueeze(1), inputs.entropy,
            settings.r, settings.adaptive, settings.tau, settings.clamp,
        )[0]  # fmt: skip
    x, W, bias, mask, I_in, I_out, numbers, entropy, H, energy = inputs
    H = F.linear(x, W) if H is None else H
    I_in = _top_k(x, mask, settings.r) if I_in is None else I_in
    measuring, record = settings.adaptive and energy is None, None
    missing = columns is None
    columns = gathered.new(W, I_in) if columns is None else columns
    riding = columns if missing and not columns.every else None  # along with a pass over H
    if I_out is None:
        I_out, record, mean = features.rank(H, mask, settings.r, measuring, riding)
        energy = mean if measuring else energy
    elif measuring:
        energy = scores.launch(H, mask, True, riding)[1]
    else:
        riding = None
    if missing and riding is None:
        gathered.fill(W, columns)
    if settings.is_plain:
        selected, core, gamma, active = factors.launch(
            W, columns, I_out, record, numbers, energy, entropy, settings.tau, mask
        )
        y, t = delta.launch(H, bias, columns, selected[:, 1], core, gamma, active, settings.clamp)
        return y, selected, core, gamma, t
    if record is not None:
        I_out = features.merged(I_out, record)
    if settings.r <= core_kernels.LARGEST_R:
        selected, core, gamma, active = core_kernels.launch(
            x, H, W, columns, I_out, numbers, energy, entropy, mask,
            settings.alpha if settings.coupled else None, settings.second_order, settings.tau,
            settings.clip == "spectral",
        )  # fmt: skip
        y, t = delta.launch(H, bias, columns, I_out, core, gamma, active, settings.clamp)
        return y, selected, core, gamma, t
    B = gradient.columns(W, I_in) if gradient.reads_columns(W, I_in) else None
    products = matrix_products(x, W, H, I_in, I_out, B, settings)
    core, gamma, inactive = cores.build(products, numbers, energy, entropy, mask, settings)
    core, gamma = cores.square(core), gamma.clone()
    taking_part = None if inactive is None else (~inactive).sum(1, dtype=torch.int32)
    y, t = delta.launch(H, bias, columns, I_out, core, gamma, taking_part, settings.clamp)
    if mask is not None:  # where a core may hold NaN
        y = torch.where(mask.any(1)[:, None, None], y, H if bias is None else H + bias)
    return y, torch.stack([I_in, I_out], 1), core, gamma, t


@lru_cache
def _rules(settings: Settings) -> again.Rules | None:
    """Return the rules of the kernels of a few tokens, which know no others."""
    rules = settings.r, settings.adaptive, settings.tau, settings.clamp
    return rules if settings.is_plain else None


def step(call: Call) -> Result | None:
    """Compute all layers of a call with one token a group, or ``None`` where no kernel does."""
    settings, layers = call.layers[0].settings, []
    rules = _rules(settings)
    if rules is None:
        return None
    for layer in call.layers:
        if layer.settings is not settings and layer.settings != settings:
            return None
        W: Tensor = layer.weight.W  # type: ignore[attr-defined]
        if type(W) is not Tensor and type(W) is not nn.Parameter:
            return None
        layers.append(_tuple(decode.Layer, (W, layer.bias, layer.numbers)))
    found = again.launch(
        call.x, layers, call.mask, call.given.I_in, call.entropy, rules, call.heads
    )
    if found is None:
        return None
    ys, I_in = found
    pairs = zip(ys, call.layers, strict=True)
    return [None if layer.is_plain else y for y, layer in pairs], I_in


def forward(inputs: Inputs, settings: Settings) -> Outputs:
    """Compute as :func:`linear` does, for callers of any backend."""
    y, selected, core, gamma, t = linear(inputs, settings)
    I_in, I_out = selected.unbind(1)
    return Outputs(y, I_in, I_out, core, gamma, None if settings.clamp is None else t)


def _layer(inputs: Inputs) -> decode.Layer:
    return decode.Layer(inputs.weight, inputs.bias, inputs.policy)


def _decodes(inputs: Inputs, settings: Settings) -> bool:
    """Return whether the kernels of a few tokens take the call."""
    if not settings.is_plain or inputs.H is not None:
        return False
    return decode.refusal(inputs.x, inputs.weight, settings.r) is None


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
    """Compute what :func:`coupling.couple` does for a query and a key projection."""
    I_in = _top_k(x, mask, r) if I_in is None else I_in
    if couple_kernels.refusal(len(W_k), r) is not None:
        return coupling.couple(x, W_q, W_k, mask, I_in, r, heads, kv_heads, scores.launch)
    return _couple(x, W_q, W_k, mask, I_in, (None, None), heads, kv_heads)


def _couple(
    x: Tensor,
    W_q: Tensor,
    W_k: Tensor,
    mask: Tensor | None,
    I_in: Tensor,
    columns: tuple[Columns | None, Columns | None],
    heads: int,
    kv_heads: int,
) -> coupling.Joint:
    """Compute what :func:`couple` does by its kernels, which fill the columns of a prefill."""
    H_q, H_k = F.linear(x, W_q), F.linear(x, W_k)
    if x.shape[1] == 1:
        for W, own in zip((W_q, W_k), columns, strict=True):
            if own is not None:
                gathered.fill(W, own)
        counted = None if mask is None else mask[:, 0]
        found = couple_kernels.launch(H_q[:, 0], H_k[:, 0], [], counted, I_in, heads, kv_heads)
    else:
        (s_q, energy_q), (s_k, energy_k) = (
            scores.launch(H, mask, True, own) for H, own in zip((H_q, H_k), columns, strict=True)
        )
        energies = [energy_q, energy_k]
        found = couple_kernels.launch(s_q, s_k, energies, None, I_in, heads, kv_heads)
    return coupling.Joint(H_q, H_k, *found)


def pair(
    query: Inputs, key: Inputs, of_query: Settings, of_key: Settings, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what :func:`operator.sharpen_pair` returns."""
    x, W_q, _, mask, I_in = query[:5]
    W_k, r, both = key.weight, of_query.r, ((query, of_query), (key, of_key))
    layers = [_layer(inputs) for inputs, _ in both]
    coupling_runs = couple_kernels.refusal(len(W_k), r) is None
    few = coupling_runs and all(
        settings.is_plain and decode.refusal(x, own.weight, r) is None for own, settings in both
    )
    if not few:
        columns: tuple[Columns | None, Columns | None] = None, None
        I_in = _top_k(x, mask, r) if I_in is None else I_in
        if coupling_runs and I_in.numel() <= x.shape[2]:
            columns = gathered.new(W_q, I_in), gathered.new(W_k, I_in)
            joint = _couple(x, W_q, W_k, mask, I_in, columns, heads, kv_heads)
        else:
            joint = couple(x, W_q, W_k, mask, I_in, r, heads, kv_heads)
        H_q, H_k, pooled, selected = joint
        I_in, energy = selected[:, 0], pooled if of_query.adaptive else None
        y_q, y_k = (
            linear(
                inputs._replace(I_in=I_in, I_out=selected[:, i], H=H, energy=energy), settings, own
            )[0]
            for i, H, own, (inputs, settings) in zip((1, 2), (H_q, H_k), columns, both, strict=True)
        )
        return y_q, y_k, I_in
    outputs = decode.launch(
        x, layers, mask, I_in, None, query.entropy, r, of_query.adaptive, of_query.tau,
        of_query.clamp, (heads, kv_heads),
    )  # fmt: skip
    return outputs[0].y, outputs[1].y, outputs[0].features[:, 0]


def _top_k(values: Tensor, mask: Tensor | None, r: int) -> Tensor:
    """Select the r features of values ``[G, T, d]`` with the largest scores."""
    if values.shape[1] == 1:  # the selection of a token that does not count is not used
        return select.launch(values[:, 0], r, absolute=True)
    return features.launch(values, mask, r, energy=False)[0]
