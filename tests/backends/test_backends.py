"""Every backend against the reference in float64, on the same random and hostile cases."""

import pytest
import torch
from cases import in_float32, random_case, reference_of

import vps
from vps import VPSConfig, functional, reference, vps_linear
from vps.backends import operator
from vps.backends.call import Inputs

CASES = {"torch": 400, "cpp": 400, "triton": 80}
NARROW = [torch.float16, torch.bfloat16]


@pytest.fixture(params=CASES)
def backend(request):
    reason = vps.backends()[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with vps.backend(request.param):
        yield request.param


def relative_error(y, expected):
    finite = expected.isfinite()
    assert torch.equal(finite, y.isfinite())
    size = expected[finite].norm().clamp(min=1e-300)
    return float((y.double() - expected)[finite].norm() / size)


def test_float32_grid(backend):
    for seed in range(CASES[backend]):
        case, wide = in_float32(random_case(seed))
        y = vps_linear(
            case["x"],
            case["W"],
            case["b"],
            case["config"],
            mask=case["mask"],
            state=case["state"],
            gradient=case["gradient"],
        )
        assert relative_error(y, reference_of(wide).y) <= 1e-6, seed


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    "settings", [{}, {"builder": "sc"}, {"order": 2, "clip": "spectral"}, {"clamp": 0.1}]
)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 7), (1, 40)])
def test_narrow_dtypes_round_once(backend, dtype, settings, shape):
    """Small integers make H exact in any dtype, so all choose alike, ties among them too."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(-2, 3, (*shape, 33), generator=generator).double()
        W = torch.randint(-1, 2, (40, 33), generator=generator).double()
        config = VPSConfig(**settings)
        expected = reference.vps_linear(x, W, config=config).y
        y = vps_linear(x.to(dtype), W.to(dtype), None, config)
        assert y.dtype == dtype
        assert relative_error(y, expected) <= 2 * torch.finfo(dtype).eps


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


@pytest.mark.parametrize("groups", [1, 5])
def test_triton_decodes_under_a_mask_in_its_own_kernels(groups, monkeypatch):
    """generate() passes a mask at every step, which a GPU cannot read without waiting."""
    if vps.backends()["triton"] is not None:
        pytest.skip(f"triton: {vps.backends()['triton']}")
    from vps.backends import triton_backend

    torch.manual_seed(0)
    x, W, b = torch.randn(groups, 1, 24), torch.randn(40, 24), torch.randn(40)
    mask = torch.arange(groups)[:, None] != 1
    expected = reference.vps_linear(
        x.double(), W.double(), b.double(), config=VPSConfig(), mask=mask
    ).y
    plan = functional.plan_for(VPSConfig(), False, 1.0, 40, 24, x.device)
    inputs = Inputs(x, W, b, mask, None, None, plan.numbers(None), None)
    monkeypatch.setattr(triton_backend.F, "linear", lambda *_: pytest.fail("a product of torch"))
    monkeypatch.setattr(torch, "stack", lambda *_: pytest.fail("features are copied"))
    y = operator._triton(*inputs, *plan.settings.packed())[0]
    monkeypatch.undo()
    assert relative_error(y, expected) <= 1e-6
