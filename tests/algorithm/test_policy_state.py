"""Entropy and history lie in one place on each device, and a change compiles nothing anew."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from vps import PolicyState, VPSConfig, VPSLinear, vps_linear
from vps.algorithm import policy

CPU, ACCELERATOR = torch.device("cpu"), torch.device("meta")  # which stands for one


def changes(state):
    """All that sets something, with what the policy is told then."""
    yield state.set_entropy(0.5), [0.5, 1.0]
    yield state.set_entropy(torch.tensor([1.5])), [1.5, 1.0]
    yield state.record(True), [1.5, 1.3]
    yield state.set_entropy(None), [-1.0, 1.3]
    for _ in range(5):
        state.record(False)
    yield None, [-1.0, 0.7]
    yield setattr(state, "outcomes", (True,)), [-1.0, 1.3]
    yield state.set_entropy(2.0), [2.0, 1.3]


@pytest.mark.parametrize("device", [CPU, ACCELERATOR])
def test_an_address_stays(device):
    state = PolicyState()
    state.set_entropy(3.0)
    first = state.signals(device)
    assert first.dtype == torch.float64 and first.shape == (2,) and first.device == device
    with torch.inference_mode():
        for _, told in changes(state):
            assert state.signals(device) is first
            assert device is ACCELERATOR or first.tolist() == told
    assert not first.is_inference()
    state.reset()
    assert device is ACCELERATOR or first.tolist() == [-1.0, 1.0]
    assert state.signals(device) is first


def test_what_was_read_does_not_change():
    state = PolicyState()
    assert state.entropy is None and state.is_idle
    state.set_entropy(0.25)
    before = state.entropy
    state.set_entropy(7.0)
    assert before == 0.25 and state.entropy == 7
    state.set_entropy(before)
    assert state.entropy == 0.25
    state.reset()
    assert state.entropy is None and state.outcomes == () and state.is_idle


def test_an_entropy_of_a_gpu_is_moved_when_a_layer_on_the_cpu_asks():
    state = PolicyState()
    state.record(True)
    on_cpu = state.signals(CPU)
    state.set_entropy(torch.tensor(1.0, device=ACCELERATOR))
    assert state.entropy.is_meta and on_cpu.tolist() == [-1.0, 1.3]
    state._signals[ACCELERATOR] = torch.tensor([2.5, 1.3], dtype=torch.float64)  # what it holds
    assert state.signals(CPU) is on_cpu and on_cpu.tolist() == [2.5, 1.3]
    assert state.entropy == 2.5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_has_its_own(copied):
    state = PolicyState()
    state.set_entropy(0.5)
    state.record(True)
    other = copied(state)
    assert other.signals(CPU).tolist() == [0.5, 1.3] and other.outcomes == (True,)
    other.set_entropy(2.0)
    assert state.signals(CPU).tolist() == [0.5, 1.3]
    fresh = copied(PolicyState())
    assert fresh.entropy is None and fresh.is_idle


@torch.no_grad()
def test_a_compiled_layer_follows_and_is_compiled_once():
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = VPSLinear(16, 20)
    layer.state.set_entropy(0.1)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x, seen = torch.randn(1, 3, 16) / 9, []
    for _ in changes(layer.state):
        seen.append(compiled(x))
        torch.testing.assert_close(seen[-1], layer(x))
    layer.state.set_entropy(None)
    torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1 and not torch.equal(seen[0], seen[1])


@torch.no_grad()
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_layer_keeps_what_was_set(strict):
    layer = VPSLinear(16, 20).requires_grad_(False)
    layer.state.set_entropy(1.0)
    layer.state.record(True)
    x = torch.randn(1, 3, 16) / 9
    exported = torch.export.export(layer, (x,), strict=strict).module()
    expected = layer(x)
    layer.state.reset()
    torch.testing.assert_close(exported(x), expected)
    assert not torch.equal(layer(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "torch", "cpp", "triton"])
def test_history_and_entropy_reach_a_backend(backend):
    """As the policy's own factor does where no state is given."""
    import vps

    x, W = torch.randn(2, 3, 16) / 9, torch.randn(20, 16)
    state, config = PolicyState(), VPSConfig(builder="sk")
    with vps.backend(backend):
        before = vps_linear(x, W, None, config, state=state)
        state.record(True)
        found = vps_linear(x, W, None, config, state=state)
        state.set_entropy(2.0)
        told = vps_linear(x, W, None, config, state=state)
    assert not torch.equal(before, found) and not torch.equal(found, told)
    energy = (x @ W.T).double().square().mean((1, 2))
    sigma = policy.sigma(energy.clone(), None, 1.3)
    assert torch.equal(sigma, policy.sigma(energy, torch.tensor([-1.0, 1.3], dtype=torch.float64)))
