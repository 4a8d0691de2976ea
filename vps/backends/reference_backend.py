"""The reference as a backend: the literal algorithm of :mod:`vps.reference`, without a gradient."""

from __future__ import annotations

from typing import Any

from vps import reference
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
    options: dict[str, Any] = {
        "config": call.config.replace(scope="sequence"),
        "mask": call.mask,
        "entropy": None if call.entropy is None else float(call.entropy),
        "outcomes": call.outcomes,
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
    both = zip(results, call.layers, strict=True)
    ys = [None if layer.is_plain else result.y for result, layer in both]
    return ys, call.x.new_empty(0)


def _projection(layer: Layer) -> reference.Projection:
    """Return a layer as the reference takes it."""
    assert isinstance(layer.weight, Matrix)
    gamma = None if layer.gamma is None else layer.gamma.plain()
    memory = [(pair.s, pair.y) for pair in layer.pairs]
    # Of a gradient the reference asks whether it turns the hybrid builder into SC.
    gradient = layer.settings.coupled
    return reference.Projection(layer.weight.W, layer.bias, gradient, memory, gamma)
