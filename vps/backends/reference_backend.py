"""The reference as a backend: the literal algorithm of :mod:`vps.reference`, without a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vps import reference
from vps.algorithm.core import Core, square
from vps.algorithm.flow import Layer
from vps.algorithm.weight import Matrix
from vps.backends.call import NOT_A_MATRIX, Call, Kind, Result


def why_missing() -> None:
    """Return ``None``: the reference runs everywhere."""


def why_not(kind: Kind) -> str | None:
    """Return why the reference does not take calls of a kind, or ``None``."""
    return None if kind.is_matrix else NOT_A_MATRIX


def run(call: Call) -> Result:
    """Run a call.

    Raises:
        RuntimeError: a gradient is asked for.
    """
    if call.needs_gradient():
        raise RuntimeError(
            "vps backend 'reference' has no gradient: expected torch.no_grad() around the layer"
        )
    if call.given.core is not None:
        return [_held(call)], call.x.new_empty(0)
    entropy = None if call.entropy is None else float(call.entropy[0])
    options: dict[str, Any] = {
        "config": call.config.replace(scope="sequence"),
        "mask": call.mask,
        "entropy": None if entropy is None or entropy < 0 else entropy,
        "outcomes": () if call.state is None else call.state.outcomes,
    }
    layers = [_projection(layer) for layer in call.layers]
    if call.heads is None:
        own = layers[0]
        results: Any = [
            reference.vps_linear(
                call.x, own.weight, own.bias, gradient=own.gradient, memory=own.memory,
                gamma=own.gamma, **options,
            )
        ]  # fmt: skip
    else:
        heads, kv_heads = call.heads
        results = reference.coupled_vps_linear(
            call.x, *layers, heads=heads, kv_heads=kv_heads, **options
        )
    for result, layer in zip(results, call.layers, strict=True):
        _hold(call, layer, result)
    both = zip(results, call.layers, strict=True)
    ys = [None if layer.is_plain else result.y for result, layer in both]
    return ys, call.x.new_empty(0)


def _hold(call: Call, layer: Layer, result: reference.Result) -> None:
    """Hold what was decided for a layer, with a column of zeros for every column left out."""
    r, groups = layer.settings.r, result.groups
    most = len(groups)
    if call.held is None or layer.is_plain:
        call.hold(layer, call.x, call.x, None, None)
        return
    like = groups[0].s_in
    core, gamma = like.new_zeros(most, r, r), like.new_tensor([own.gamma for own in groups])
    I_in = torch.zeros(most, r, dtype=torch.int64, device=like.device)
    I_out = torch.zeros_like(I_in)
    for at, own in enumerate(groups):
        core[at, : own.rank, : own.rank] = own.core
        I_in[at, : own.rank], I_out[at, : own.rank] = own.I_in[: own.rank], own.I_out[: own.rank]
    assert isinstance(layer.weight, Matrix)
    call.hold(layer, I_in, I_out, Core(core, gamma, None), layer.weight.W[I_out])


def _held(call: Call) -> Tensor:
    """Return y of later tokens, sequence by sequence."""
    (layer,), (I_in, I_out, _, core, *_) = call.layers, call.given
    assert core is not None and I_in is not None and I_out is not None
    own, matrices = _projection(layer), square(core.matrix)
    ys = []
    for g, x in enumerate(call.x):
        C = matrices[g]
        if core.inactive is not None:
            C = C.masked_fill(core.inactive[g].unsqueeze(1), 0.0)
        ys.append(
            reference.held_vps_linear(
                x, own.weight, own.bias, I_in[g], I_out[g], C, float(core.gamma[g]),
                clamp=layer.settings.clamp, memory=own.memory,
            )
        )  # fmt: skip
    return torch.stack(ys)


def _projection(layer: Layer) -> reference.Projection:
    """Return a layer as the reference takes it."""
    assert isinstance(layer.weight, Matrix)
    gamma = None if layer.gamma is None else layer.gamma.plain()
    memory = [(pair.s, pair.y) for pair in layer.pairs]
    # Of a gradient the reference asks whether it turns the hybrid builder into SC.
    gradient = layer.settings.coupled
    return reference.Projection(layer.weight.W, layer.bias, gradient, memory, gamma)
