"""Every backend against the reference in float64, on the same random and hostile cases."""

import pytest
import torch
import torch.nn.functional as F
from cases import (
    columns_of,
    coupled_case,
    coupled_in_float32,
    drawn_gamma,
    in_float32,
    random_case,
    reference_of,
    reference_of_pair,
    relative_error,
    sharpened,
    sharpened_pair,
)

from vps import VPSConfig, functional, reference, vps_linear
from vps.backends import operator
from vps.backends.call import Inputs
from vps.functional import Projection, coupled_vps_linear

OWN = [-0.6, [0.5, -1.25, 0.0, 0.25]]  # γ of a layer's own
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
OWN_GAMMA = pytest.mark.parametrize("own", [False, True], ids=["config", "own"])


def seeds(backend, count, interpreted):
    """As many cases, but fewer in Triton's interpreter."""
    return range(interpreted if backend == "triton" else count)


@OWN_GAMMA
def test_float32_grid(backend, own):
    for seed in seeds(backend, 400, 30 if own else 80):
        case, wide = in_float32(random_case(seed))
        gamma = drawn_gamma(seed, columns_of(case, case["W"])) if own else None
        y = sharpened(case, gamma=gamma)
        assert relative_error(y, reference_of(wide, gamma=gamma).y) <= 1e-6, seed


@OWN_GAMMA
@pytest.mark.parametrize("backend", ["torch", "cpp", "triton", "reference"], indirect=True)
@torch.no_grad()
def test_float32_grid_of_pairs(backend, own):
    """A query or key whose own γ is 0 takes part in the selection, and is the base product."""
    for seed in seeds(backend, 150, 20):
        case, wide = coupled_in_float32(coupled_case(seed))
        gammas = [None, None]
        if own:
            r = columns_of(case, case["weights"][1])
            gammas = [drawn_gamma(seed, r), drawn_gamma(seed + 1, r)]
            if seed % 5 == 0:
                gammas[seed // 5 % 2] = 0.0
        ys = sharpened_pair(case, gammas)
        expected = reference_of_pair(wide, gammas)
        for y, right, gamma, *layer in zip(
            ys, expected, gammas, case["weights"], case["bias"], strict=True
        ):
            if gamma == 0.0 and backend != "reference":
                base = F.linear(case["x"], *layer)
                assert torch.equal(y.nan_to_num(1e30), base.nan_to_num(1e30))
            elif 0.0 not in gammas or case["x"].isfinite().all():
                assert relative_error(y, right.y) <= 1e-6, seed


def integers(*shape, limit, seed):
    """Small integers make H exact in any dtype, so all choose alike, ties among them too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator).double()


@DTYPES
@pytest.mark.parametrize(
    "settings", [{}, {"builder": "sc"}, {"order": 2, "clip": "spectral"}, {"clamp": 0.1}]
)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 7), (1, 40)])
def test_narrow_dtypes_round_once(backend, dtype, settings, shape):
    config = VPSConfig(**settings)
    for seed in range(3):
        x, W = integers(*shape, 33, limit=2, seed=seed), integers(40, 33, limit=1, seed=seed)
        for gamma in (None, *OWN) if seed == 0 else (None,):
            expected = reference.vps_linear(x, W, config=config, gamma=gamma).y
            y = vps_linear(x.to(dtype), W.to(dtype), None, config, gamma=gamma)
            assert y.dtype == dtype
            assert relative_error(y, expected) <= 2 * torch.finfo(dtype).eps


@DTYPES
def test_pairs_in_narrow_dtypes_round_once(backend, dtype):
    for shape in ((1, 1), (2, 7)):
        x = integers(*shape, 33, limit=2, seed=len(shape))
        both = [integers(n, 33, limit=1, seed=n) for n in (24, 12)]
        expected = reference.coupled_vps_linear(
            x, *map(reference.Projection, both), heads=4, kv_heads=2, config=VPSConfig()
        )
        ys = coupled_vps_linear(x.to(dtype), *(Projection(W.to(dtype)) for W in both), 4, 2)
        for y, right in zip(ys, expected, strict=True):
            assert y.dtype == dtype
            assert relative_error(y, right.y) <= 2 * torch.finfo(dtype).eps


def test_strides(backend):
    torch.manual_seed(0)
    x, W = torch.randn(2, 9, 24), torch.randn(30, 24)
    expected = vps_linear(x, W)
    for other in (x.mT.contiguous().mT, x.repeat_interleave(3, -1)[..., ::3]):
        assert torch.allclose(vps_linear(other, W), expected, atol=1e-5)
    for other in (W.T.contiguous().T, W.repeat_interleave(2, 0)[::2]):
        assert torch.allclose(vps_linear(x, other), expected, atol=1e-5)


@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_a_sequence_does_not_depend_on_its_batch(backend, scope):
    torch.manual_seed(1)
    x, W = torch.randn(5, 6, 24), torch.randn(30, 24)
    config = VPSConfig(scope=scope)
    together = vps_linear(x, W, None, config)
    for index in range(5):
        alone = vps_linear(x[index : index + 1], W, None, config)[0]
        assert torch.allclose(together[index], alone, rtol=1e-5, atol=1e-5)


def test_two_runs_are_bitwise_equal(backend):
    torch.manual_seed(2)
    W = torch.randn(300, 200)
    for tokens in (1, 5, 64):
        x = torch.randn(2, tokens, 200)
        assert torch.equal(vps_linear(x, W), vps_linear(x.clone(), W))


def test_equal_columns_are_one_number_where_nothing_is_clamped(backend):
    torch.manual_seed(0)
    x, W = torch.randn(2, 5, 24), torch.randn(30, 24)
    for config in (VPSConfig(), VPSConfig(order=2, builder="sc"), VPSConfig(clip="spectral")):
        one = vps_linear(x, W, None, config, gamma=-0.4)
        columns = vps_linear(x, W, None, config, gamma=[-0.4] * 4)
        torch.testing.assert_close(columns, one, rtol=1e-5, atol=1e-5)
        fixed = config.replace(gamma=0.4, adaptive_gamma=False)
        torch.testing.assert_close(
            vps_linear(x, W, None, config, gamma=0.4), vps_linear(x, W, None, fixed), rtol=0, atol=0
        )


def test_gamma_zero_is_the_base_bit_for_bit(backend):
    torch.manual_seed(0)
    x, W, b = torch.randn(3, 1, 24), torch.randn(30, 24), torch.randn(30)
    x[0, 0, 0] = float("inf")
    for gamma in (0.0, -0.0, [0.0] * 4):
        y = vps_linear(x, W, b, gamma=gamma)
        assert torch.equal(y.nan_to_num(7), F.linear(x, W, b).nan_to_num(7))


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_triton_decodes_under_a_mask_in_its_own_kernels(backend, groups, monkeypatch):
    """generate() passes a mask at every step, which a GPU cannot read without waiting."""
    from vps.backends import triton_backend

    torch.manual_seed(0)
    x, W, b = torch.randn(groups, 1, 24), torch.randn(40, 24), torch.randn(40)
    mask = torch.arange(groups)[:, None] != 1
    expected = reference.vps_linear(
        x.double(), W.double(), b.double(), config=VPSConfig(), mask=mask
    ).y
    plan = functional.plan_for(VPSConfig(), False, 40, 24, x.device)
    inputs = Inputs(x, W, b, mask, None, None, plan.numbers(None), None)
    monkeypatch.setattr(triton_backend.F, "linear", lambda *_: pytest.fail("a product of torch"))
    monkeypatch.setattr(torch, "stack", lambda *_: pytest.fail("features are copied"))
    y = operator._triton(*inputs, *plan.settings.packed())[0]
    monkeypatch.undo()
    assert relative_error(y, expected) <= 1e-6
