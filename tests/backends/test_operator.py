"""torch.ops.vps.linear: registration, gradient, tracing; and the choice of a backend."""

from functools import partial

import pytest
import torch
from processes import python
from torch import nn

import vps
from vps import VPSConfig, VPSLinear, vps_linear
from vps.algorithm import policy
from vps.backends import dispatch, operator, torch_backend
from vps.backends.call import Inputs, Kind, differentiable

SETTINGS = [
    {},
    {"builder": "sc", "order": 2},
    {"clamp": 0.02, "clip": "spectral"},
    {"builder": "random"},
    {"scope": "token", "adaptive_gamma": False, "adaptive_rank": False},
]
NAMES = ["torch", "cpp", "triton"]


def inputs_of(config, dtype=torch.float32, grad=False, bias=True, mask=True):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12, dtype=dtype, requires_grad=grad)
    weight = torch.randn(10, 12, dtype=dtype, requires_grad=grad)
    b = torch.randn(10, dtype=dtype, requires_grad=grad) if bias else None
    counted = torch.rand(2, 5) < 0.7 if mask else None
    numbers = torch.tensor(policy.bounds(config, 1.0), dtype=torch.float64)
    settings = policy.settings(config, False, 12, 10)
    I_in = I_out = None
    if config.builder == "random":
        I_in, I_out = torch.tensor([[3, 1, 7, 0]] * 2), torch.tensor([[2, 9, 4, 1]] * 2)
    return Inputs(x, weight, b, counted, I_in, I_out, numbers, None), settings


@pytest.mark.parametrize("settings", SETTINGS)
def test_opcheck(settings):
    inputs, static = inputs_of(VPSConfig(**settings), grad=True)
    torch.library.opcheck(torch.ops.vps.linear.default, (*inputs, *static.packed()))


@pytest.mark.skipif(vps.backends()["cpp"] is not None, reason="the C++ operator alone has it")
@pytest.mark.parametrize("settings", SETTINGS)
def test_without_a_gradient_y_and_features_are_the_same(settings):
    inputs, static = inputs_of(VPSConfig(**settings))
    torch.library.opcheck(torch.ops.vps.linear_only.default, (*inputs, *static.packed()))
    y, features, *_ = torch.ops.vps.linear.default(*inputs, *static.packed())
    y_only, I_in = torch.ops.vps.linear_only.default(*inputs, *static.packed())
    assert torch.equal(y, y_only) and torch.equal(features[:, 0], I_in)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("mask", [False, True])
def test_gradient_equals_that_of_the_torch_backend(settings, mask):
    config = VPSConfig(**settings)
    gradients = []
    in_torch = partial(differentiable, forward=torch_backend.forward)
    for sharpen in (operator.sharpen, in_torch):
        inputs, static = inputs_of(config, grad=True, mask=mask)
        y, _ = sharpen(inputs, static)
        y.square().sum().backward()
        gradients.append([tensor.grad for tensor in inputs[:3]])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gradient_of_a_sum_of_outputs_only():
    """Nothing flows from the selection, and a missing output gradient is no gradient."""
    inputs, static = inputs_of(VPSConfig(), grad=True)
    y, features, core, gamma, _ = torch.ops.vps.linear.default(*inputs, *static.packed())
    assert y.requires_grad and not features.requires_grad
    (core.sum() + gamma.sum()).backward()
    assert inputs.x.grad is None or not inputs.x.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_that_was_asked_for_runs_or_raises(name):
    layer = VPSLinear.from_linear(nn.Linear(8, 8)).requires_grad_(False)
    x = torch.randn(2, 3, 8)
    reason = vps.backends()[name]
    if reason is not None:
        with pytest.raises(RuntimeError, match=name):
            with vps.backend(name):
                layer(x)
        return
    with vps.backend(name):
        y = layer(x)
    with vps.backend("reference"), torch.no_grad():
        assert torch.allclose(y, layer(x), atol=1e-5)
    assert not dispatch.STATE.backends


def test_bad_backends_are_named():
    layer = VPSLinear.from_linear(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="unknown backend 'numpy'"), vps.backend("numpy"):
        pass
    with vps.backend("reference"):
        with pytest.raises(RuntimeError, match="no_grad"):
            layer(torch.randn(3, 8))
        with vps.backend("torch"):
            layer(torch.randn(3, 8))
    if vps.backends()["cpp"] is None:
        with vps.backend("cpp"), pytest.raises(RuntimeError, match="float64"):
            VPSLinear.from_linear(nn.Linear(4, 4, dtype=torch.float64))(
                torch.randn(3, 4, dtype=torch.float64)
            )


@pytest.mark.parametrize("value, expected", [("reference", "no_grad"), ("gpu", "unknown backend")])
def test_the_environment_chooses(value, expected):
    code = "import torch, vps; vps.VPSLinear(4, 4)(torch.randn(2, 4))"
    run = python(code, VPS_BACKEND=value)
    assert run.returncode != 0 and expected in run.stderr.splitlines()[-1]


def test_fake_tensors_leave_nothing_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    linear = nn.Linear(13, 11)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = vps_linear(torch.randn(2, 13), torch.randn(11, 13), torch.randn(11))
    assert fake.shape == (2, 11)
    x = torch.randn(2, 13)
    with torch.no_grad(), vps.backend("reference"):
        expected = VPSLinear.from_linear(linear)(x)
    assert torch.allclose(vps_linear(x, linear.weight, linear.bias), expected, atol=1e-5)


def test_a_library_that_does_not_load_is_a_reason_not_a_crash(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    code = (
        "import torch, vps; print(vps.backends()['cpp']);"
        "print(vps.VPSLinear(4, 4)(torch.randn(2, 4)).shape)"
    )
    run = python(code, VPS_CPP_LIBRARY=str(broken))
    assert run.returncode == 0, run.stderr
    assert "does not load" in run.stdout and "[2, 4]" in run.stdout


@pytest.mark.parametrize("rule", [{"clip": "other"}, {"builder": "other"}])
def test_a_rule_that_no_compiled_backend_knows_falls_to_torch(rule):
    for device in ("cpu", "cuda"):
        kind = Kind(device, torch.float32, **rule)
        assert dispatch.fastest(kind) is torch_backend
        for name in ("cpp", "triton", "cuda"):
            assert "of which this backend knows" in dispatch.why_not(name, kind)
