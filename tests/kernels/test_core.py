"""Kernels of the r × r cores against the core of the algorithm in float64."""

import itertools

import pytest
import torch

pytest.importorskip("triton")
from vps.algorithm import core as cores
from vps.algorithm.policy import Settings
from vps.algorithm.weight import matrix_products
from vps.kernels import columns
from vps.kernels.prefill import core

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
ADAPTIVE = [1.0, 0.3, 0.8, 1, 4, 16, 64, 1, 2]
KINDS = [  # SC, order 2, spectral
    kind for kind in itertools.product([False, True], repeat=3) if any(kind)
]


def layer(groups, tokens, d_in, d_out, r, dtype, device):
    x = torch.randn(groups, tokens, d_in, device=device).to(dtype)
    W = (torch.randn(d_out, d_in, device=device) / d_in**0.5).to(dtype)
    I_in, I_out = (
        torch.stack([torch.randperm(d, device=device)[:r] for _ in range(groups)])
        for d in (d_in, d_out)
    )
    return x, (x.double() @ W.double().T).to(dtype), W, I_in, I_out


def run(x, H, W, I_in, I_out, policy, energy, entropy, mask, settings):
    return core.launch(
        x, H, W, columns.launch(W, I_in), I_out, policy, energy, entropy, mask,
        settings.alpha if settings.coupled else None, settings.second_order, settings.tau,
        settings.clip == "spectral",
    )  # fmt: skip


def expected(x, H, W, I_in, I_out, policy, energy, entropy, mask, settings):
    """In float64 on the CPU."""
    x, H, W, policy = (tensor.double().cpu() for tensor in (x, H, W, policy))
    energy = None if energy is None else energy.double().cpu()
    mask = None if mask is None else mask.cpu()
    B = W[:, I_in.cpu()]
    products = matrix_products(x, W, H, I_in.cpu(), I_out.cpu(), B, settings)
    matrix, gamma, inactive = cores.build(products, policy, energy, entropy, mask, settings)
    r = I_in.shape[1]
    active = torch.full((len(x),), r) if inactive is None else (~inactive).sum(1)
    counted = torch.ones(len(x), dtype=torch.bool) if mask is None else mask.any(1)
    matrix = cores.square(matrix).expand(len(x), r, r)
    return matrix.masked_fill(~counted[:, None, None], 0.0), gamma, active * counted


def settings_of(kind, r, tau=0.8, adaptive=True):
    coupled, second, spectral = kind
    clip = "spectral" if spectral else "component"
    return Settings(r, adaptive, coupled, second, 1e-3, tau, clip, None)


def check(*arguments):
    (features, matrix, gamma, active), wide = run(*arguments), expected(*arguments)
    W, tolerance = arguments[2], 1e-9 if arguments[2].dtype == torch.float64 else 2e-5
    assert torch.equal(features, torch.stack(arguments[3:5], 1))
    assert matrix.dtype == gamma.dtype == (W.dtype if W.element_size() == 8 else torch.float32)
    assert torch.equal(active.cpu(), wide[2].int())
    torch.testing.assert_close(gamma.double().cpu(), wide[1].double(), rtol=1e-6, atol=0)
    error = (matrix.double().cpu() - wide[0]).norm() / wide[0].norm().clamp(min=1e-30)
    assert error <= tolerance, float(error)


def numbers(device, values=ADAPTIVE):
    return torch.tensor(values, dtype=torch.float64, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_core(device, dtype, kind):
    """One token, fewer tokens than columns, several stretches of both; policies of both orders."""
    energy = torch.tensor([0.02, 0.9], device=device, dtype=torch.float64)
    for tokens, d_in, d_out, r in ((1, 20, 30, 4), (3, 9, 530, 8), (520, 700, 33, 3)):
        given = layer(2, tokens, d_in, d_out, r, dtype, device)
        E = energy.to(torch.float64 if dtype == torch.float64 else torch.float32)
        for tau in (0.8, 1e-2, None):
            check(*given, numbers(device), E, None, None, settings_of(kind, r, tau))
    gammas = torch.rand(3, dtype=torch.float64, device=device) - 0.5
    fixed = torch.cat([numbers(device, [1.0, 0.5, 0.5, 3, 3, 32, 32, 2, 2]), gammas])
    mask = torch.rand(2, 520, device=device) < 0.6
    for counted in (mask, mask & torch.tensor([[True], [False]], device=device)):
        check(*given, fixed, None, None, counted, settings_of(kind, 3, 0.05, False))


@pytest.mark.parametrize("tokens", [2, 40])
def test_what_is_not_finite_or_an_outlier(device, tokens):
    """Broken tokens count 0 in SC; an outlier feature leaves the ridge its digits."""
    x, H, W, I_in, I_out = layer(2, tokens, 12, 20, 4, torch.float32, device)
    x[0, 0, I_in[0, 1]], H[1, 1, I_out[1, 2]] = float("nan"), float("inf")
    x[1, :, I_in[1, 0]] *= 1e4
    for kind in ((True, False, False), (True, True, True)):
        settings = settings_of(kind, 4, 0.1, False)
        policy = numbers(device, [1.0, 0.5, 0.5, 4, 4, 32, 32, 2, 2])
        check(x, H, W, I_in, I_out, policy, None, None, None, settings)


def test_more_columns_than_there_are_and_strides(device):
    x, H, W, I_in, I_out = layer(5, 9, 6, 20, 3, torch.float32, device)
    for kind in ((True, True, True), (False, True, False)):
        settings, energy = settings_of(kind, 3), torch.rand(5, device=device)
        plain = run(x, H, W, I_in, I_out, numbers(device), energy, None, None, settings)
        views = (
            x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
            H.repeat_interleave(2, 2)[:, :, ::2],
            W.T.contiguous().T, I_in.T.contiguous().T, I_out.T.contiguous().T,
        )  # fmt: skip
        check(x, H, W, I_in, I_out, numbers(device), energy, None, None, settings)
        again = run(*views, numbers(device), energy, None, None, settings)
        assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("tokens", [2, 70])
def test_a_group_does_not_depend_on_the_others(device, tokens):
    given = layer(3, tokens, 40, 30, 4, torch.bfloat16, device)
    energy, settings = torch.rand(3, device=device), settings_of((True, True, True), 4)
    together = run(*given, numbers(device), energy, None, None, settings)
    x, H, W, I_in, I_out = given
    for g in range(3):
        one = slice(g, g + 1)
        part = x[one], H[one], W, I_in[one], I_out[one]
        alone = run(*part, numbers(device), energy[one], None, None, settings)
        assert all(torch.equal(a[one], b) for a, b in zip(together, alone, strict=True))


def test_errors():
    given = layer(1, 2, 10, 12, 9, torch.float32, "cpu")
    with pytest.raises(ValueError, match="r must be from 1 to 8, got 9"):
        run(*given, numbers("cpu"), None, None, None, settings_of((True, False, False), 9))
