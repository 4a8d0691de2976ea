"""The L-BFGS memory against dense BFGS, and layers that compute with it (SPEC §8)."""

import copy
import itertools

import pytest
import torch
from cases import copies, reference_of, sharpened
from torch import nn

import vps
from vps import VPSConfig, VPSLinear, reference, vps_linear
from vps.algorithm.lbfgs import CAPACITY, CurvatureMemory


def passes(d, n, dtype=torch.float64, seed=0):
    """Outputs and gradients of n passes, of a quadratic so that every pair is kept."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, dtype=dtype, generator=generator) / d**0.5
    hessian = root @ root.T + torch.eye(d, dtype=dtype)
    outputs = [torch.randn(d, dtype=dtype, generator=generator) for _ in range(n)]
    return [(w, hessian @ w) for w in outputs]


def remembering(d, pairs, dtype=torch.float64, seed=0):
    memory = CurvatureMemory()
    for w, g in passes(d, pairs + 1 if pairs else 0, dtype, seed):
        memory.record(w, g)
    assert len(memory) == min(pairs, CAPACITY)
    return memory


def dense(pairs):
    """``H_k`` in the product form of Nocedal and Wright (7.19), written out term by term."""
    s, y = pairs[-1]
    one = torch.eye(len(s), dtype=s.dtype)
    V = [one - y.outer(s) / (s @ y) for s, y in pairs]

    def product(matrices):
        result = one
        for matrix in matrices:
            result = result @ matrix
        return result

    H = product([v.T for v in reversed(V)]) * ((s @ y) / (y @ y)) @ product(V)
    for i, (s, y) in enumerate(pairs):
        left = product([v.T for v in reversed(V[i + 1 :])])
        H = H + left @ (s.outer(s) / (s @ y)) @ left.T
    return H


@pytest.mark.parametrize("pairs", range(1, 9))
def test_two_loops_are_the_dense_inverse_hessian(pairs):
    d = 12
    memory = remembering(d, pairs, seed=pairs)
    known = passes(d, pairs + 1, seed=pairs)
    expected_pairs = [(w - v, g - f) for (v, f), (w, g) in itertools.pairwise(known)][-CAPACITY:]
    H = dense(expected_pairs)
    assert torch.allclose(reference.inverse_hessian(expected_pairs), H, rtol=1e-12, atol=1e-12)
    s, y = expected_pairs[-1]
    assert torch.allclose(H @ y, s, rtol=1e-10, atol=1e-12)  # the secant equation
    B = torch.randn(d, 3, 2, dtype=torch.float64)
    kept = B.clone()
    assert torch.allclose(memory.apply(B), torch.tensordot(H, B, 1), rtol=1e-11, atol=1e-11)
    assert torch.equal(B, kept)


def test_an_empty_memory_changes_nothing():
    memory, B = CurvatureMemory(), torch.randn(6, 2)
    assert not memory and torch.equal(memory.apply(B), B) and memory.apply(B) is not B
    memory.record(*passes(6, 1, torch.float32)[0])
    assert not memory and torch.equal(memory.apply(B), B)  # one pass makes no pair
    layer = VPSLinear(6, 6)
    x = torch.randn(3, 6)
    expected = layer(x)
    layer.memory = memory
    assert torch.equal(layer(x), expected)


def test_what_is_not_kept():
    (w, g), (v, f) = passes(6, 2)
    memory = CurvatureMemory()
    assert not memory.record(w, g)
    assert not memory.record(w + 1e-5, g + 1e-5)  # sᵀy = 6e-10
    assert not memory.record(v, 2 * g - f)  # negative curvature
    assert not memory.record(v, f * torch.nan) and not memory.record(v / 0, g)
    last = v + 1
    assert memory.record(last, 2 * g - f + 1)  # compared with the last finite pass
    assert torch.allclose(memory.pairs[0].s, torch.ones_like(v))
    last.zero_()  # what it holds is a copy
    assert memory.record(v + 2, 2 * g - f + 2)
    assert torch.allclose(memory.pairs[1].s, torch.ones_like(v))
    memory.clear()
    assert not memory and not memory.record(v, g)


@pytest.mark.parametrize(
    ("w", "g"), [(torch.ones(2, 3), torch.ones(2, 3)), (torch.ones(3), torch.ones(4))]
)
def test_shapes_are_named(w, g):
    with pytest.raises(ValueError, match="must both be"):
        CurvatureMemory().record(w, g)
    memory = remembering(5, 1)
    with pytest.raises(ValueError, match=r"\(5,\) as before"):
        memory.record(torch.ones(3), torch.ones(3))


def both(case, memory, pairs):
    shared = {name: case[name] for name in ("mask", "gradient")}
    y = vps_linear(
        case["x"], case["W"], case["b"], case["config"],
        state=case["state"], memory=memory, **shared,
    )  # fmt: skip
    expected = reference.vps_linear(
        case["x"], case["W"], case["b"], config=case["config"],
        entropy=case["entropy"], outcomes=case["outcomes"], memory=pairs, **shared,
    ).y  # fmt: skip
    return y, expected


@pytest.mark.parametrize("clamp", [None, 0.05])
@pytest.mark.parametrize("scope", ["sequence", "batch", "token"])
@pytest.mark.parametrize("clip", ["component", "spectral"])
def test_everything_at_once_equals_the_reference(clip, scope, clamp):
    """SC, L-BFGS, order 2, clamp and either clip together: 1e-10 in float64."""
    config = VPSConfig(
        builder="hybrid", order=2, clip=clip, scope=scope, clamp=clamp, tau=0.3,
        gamma=0.7, adaptive_gamma=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 9, 40, dtype=torch.float64, generator=generator)
    W = torch.randn(32, 40, dtype=torch.float64, generator=generator) / 6
    memory = remembering(32, 4)
    case = dict(x=x, W=W, b=None, config=config, mask=None, state=None, entropy=None,
                outcomes=(), gradient=True)  # fmt: skip
    y = sharpened(case, memory=memory)
    expected = reference_of(case, memory=[(pair.s, pair.y) for pair in memory.pairs]).y
    assert (y - expected).norm() <= 1e-10 * (expected - x @ W.T).norm()
    without = sharpened(case)
    assert (without - expected).norm() > 1e-5 * (expected - x @ W.T).norm()
    off = case | {"config": config.replace(lbfgs=False)}
    assert torch.equal(sharpened(off, memory=memory), without)
    assert torch.allclose(reference_of(off, memory=[(W[:, 0], W[:, 1])]).y, without)


def test_narrow_dtypes_stay_near_float64():
    torch.manual_seed(2)
    linear, x = nn.Linear(48, 40), torch.randn(2, 6, 48)
    config = VPSConfig(builder="sc", order=2, clamp=0.5)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
        memory = remembering(40, 3, torch.float32)
        layer = VPSLinear.from_linear(copy.deepcopy(linear).to(dtype), config)
        layer.memory = memory
        wide = reference.vps_linear(
            x.to(dtype).double(), layer.weight.double(), layer.bias.double(), config=config,
            memory=[(pair.s.double(), pair.y.double()) for pair in memory.pairs],
        ).y  # fmt: skip
        assert layer(x.to(dtype)).dtype == dtype
        assert (layer(x.to(dtype)).double() - wide).norm() <= bound * wide.norm()


def test_which_backend_computes(monkeypatch):
    layer = VPSLinear(8, 8)
    layer.memory = remembering(8, 2, torch.float32)
    x = torch.randn(3, 8)
    expected = layer(x)
    with vps.backend("torch"):
        assert torch.equal(layer(x), expected)
    with vps.backend("reference"), torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=1e-6)
    monkeypatch.setattr(vps.backends.dispatch.STATE, "backends", ["cpp"])
    with pytest.raises(RuntimeError, match=r"'cpp' cannot run.*lbfgs=False"):
        layer(x)
    layer.memory.clear()
    monkeypatch.setattr(vps.backends.dispatch.STATE, "backends", ["torch"])
    assert not torch.equal(layer(x), expected)


def test_flag_and_memory_are_plain_attributes():
    layer = VPSLinear(8, 8)
    layer.gradient, layer.memory = True, remembering(8, 2, torch.float32)
    x = torch.randn(3, 8)
    expected = layer(x)
    for other in copies(layer):
        assert torch.equal(other(x), expected) and other.memory is not layer.memory
    assert set(layer.state_dict()) == {"weight", "bias"}
    plain = layer.to_linear()
    assert not {"gradient", "memory", "config", "state"} & set(vars(plain))
    again = VPSLinear.from_linear(plain)
    assert again.gradient is False and again.memory is None
