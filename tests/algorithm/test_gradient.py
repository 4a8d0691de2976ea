"""Gradients: those of the formula with selection, core and γ held constant (SPEC §6)."""

import pytest
import torch
from cases import held_constant, memory_of

from vps import VPSConfig, reference, vps_linear
from vps.functional import Projection, coupled_vps_linear


def gradients(y, g, leaves):
    return [y, *torch.autograd.grad(y, leaves, g)]


@pytest.mark.parametrize("clamp", [None, 0.02])
@pytest.mark.parametrize("settings", [{}, {"builder": "sc", "order": 2}, {"scope": "token"}])
def test_of_one_layer(backend, clamp, settings):
    torch.manual_seed(4)
    dtype = torch.float64 if backend == "torch" else torch.float32
    near = dict(rtol=1e-10, atol=1e-12) if backend == "torch" else dict(rtol=1e-4, atol=1e-4)
    config = VPSConfig(clamp=clamp, **settings)
    leaves = torch.randn(2, 5, 9), torch.randn(8, 9), torch.randn(8)
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    g = torch.randn(2, 5, 8, dtype=dtype)
    for own in (None, -0.6, [0.5, -1.0, 0.0, 0.25]):
        found = gradients(vps_linear(*leaves, config, gamma=own), g, leaves)
        x, W, b = wide
        result = reference.vps_linear(x, W, config=config, gamma=own)
        y = held_constant(x, W, result, clamp, own) + b
        for one, other in zip(found, gradients(y, g.double(), wide), strict=True):
            torch.testing.assert_close(one.double(), other, **near)


@pytest.mark.parametrize("clamp", [None, 0.05])
def test_with_a_memory(clamp):
    """The factor that it changes counts in both passes."""
    config = VPSConfig(
        builder="sk", rank=3, adaptive_rank=False, gamma=0.7, adaptive_gamma=False, clamp=clamp
    )
    torch.manual_seed(1)
    x = torch.randn(1, 7, 20, dtype=torch.float64, requires_grad=True)
    W = torch.randn(16, 20, dtype=torch.float64) / 4
    steps = torch.randn(3, 16, dtype=torch.float64)
    pairs = [(30 * s, (s + 0.1 * s.sign()) / 30) for s in steps]  # an inverse of about 900
    y = vps_linear(x, W, None, config, memory=memory_of(pairs, 16))
    result = reference.vps_linear(x, W, config=config, memory=pairs)
    expected = held_constant(x, W, result, clamp, memory=pairs)
    g = torch.randn_like(y)
    for one, other in zip(gradients(y, g, [x]), gradients(expected, g, [x]), strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(expected, held_constant(x, W, result, clamp), rtol=1e-3)


def test_of_a_pair():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    both = [torch.randn(n, 12, dtype=torch.float64) for n in (16, 8)]
    results = reference.coupled_vps_linear(
        x, *map(reference.Projection, both), heads=4, kv_heads=2, config=VPSConfig()
    )
    ys = coupled_vps_linear(x, *map(Projection, both), 4, 2)
    for y, W, result in zip(ys, both, results, strict=True):
        g = torch.randn_like(y)
        (found,) = torch.autograd.grad(y, x, g, retain_graph=True)
        (expected,) = torch.autograd.grad(held_constant(x, W, result), x, g)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
