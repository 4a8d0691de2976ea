"""The torch backend: the flow of :mod:`vps.algorithm.flow`, for every kind of weight and call."""

from __future__ import annotations

from vps.algorithm import flow
from vps.algorithm.flow import Given, Layer
from vps.algorithm.policy import Settings
from vps.algorithm.weight import Matrix
from vps.backends.call import Call, Inputs, Kind, Outputs, Result


def why_missing() -> None:
    """Return ``None``: torch runs everywhere."""


def why_not(kind: Kind) -> None:
    """Return ``None``: torch takes every call."""


def run(call: Call) -> Result:
    """Run a call; autograd gives its gradient."""
    try:
        outcomes, I_in = flow.sharpen(
            call.x, call.layers, call.mask, call.entropy, call.heads, call.given
        )
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
