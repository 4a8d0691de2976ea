"""Layers for the C++ operator, and the operator as vps.functional calls it."""

from types import SimpleNamespace

import torch

from vps.algorithm import policy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["float32", "bfloat16", "float16"]


def make(G=1, T=7, d_in=45, d_out=67, dtype=torch.float32, bias=True, seed=0):
    """x, W and b with a few features that stand out, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(G, T, d_in, generator=generator)
    x[..., :: max(2, d_in // 4)] *= 4
    weight = torch.randn(d_out, d_in, generator=generator) / d_in**0.5
    weight[:: max(2, d_out // 4)] *= 3
    b = torch.randn(d_out, generator=generator) if bias else None
    return SimpleNamespace(x=x.to(dtype), W=weight.to(dtype), b=None if b is None else b.to(dtype))


def call(data, config, mask=None, entropy=None, outcomes=(), gradient=False, **features):
    """The operator as vps.functional calls it."""
    d_out, d_in = data.W.shape
    state = policy.PolicyState()
    state.outcomes = tuple(outcomes)
    state.set_entropy(entropy)
    numbers = torch.tensor(policy.bounds(config), dtype=torch.float64)
    settings = policy.settings(config, gradient, d_in, d_out)
    entropy = state.signals(numbers.device)
    I_in, I_out = features.get("I_in"), features.get("I_out")
    with torch.no_grad():
        out = torch.ops.vps.linear(
            data.x, data.W, data.b, mask, I_in, I_out, numbers, entropy, None, None,
            *settings.packed(),
        )  # fmt: skip
    return SimpleNamespace(**dict(zip(("y", "features", "core", "gamma", "t"), out, strict=True)))


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
