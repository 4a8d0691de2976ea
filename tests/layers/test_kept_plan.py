"""What a layer keeps between calls holds until something of it changes, and is never wrong."""

import copy
import os
import pickle
import sys
import weakref

import pytest
import torch
from tiny import tiny_llama
from torch import nn

import vps
from vps import PolicyState, VPSConfig, VPSLinear, vps_linear
from vps.algorithm.lbfgs import CurvatureMemory
from vps.algorithm.policy import LayerGamma
from vps.model.patching import sharpened_layers

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(vps.__file__))) + os.sep


def made(**options):
    torch.manual_seed(0)
    linear = nn.Linear(12, 10).requires_grad_(False)
    return VPSLinear.from_linear(linear, VPSConfig(**options)), torch.randn(2, 5, 12)


def fresh(layer, x):
    """What a layer without anything kept gives."""
    return vps_linear(
        x, layer.weight, layer.bias, layer.config, state=layer.state, gradient=layer.gradient,
        memory=layer.memory, gamma=layer.gamma,
    )  # fmt: skip


def outcomes(layer):
    for _ in range(3):
        layer.state.record(True)


def memory(layer):
    layer.memory = CurvatureMemory()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(10, generator=generator)
        layer.memory.record(w, w + 0.1 * torch.randn(10, generator=generator))
    assert layer.memory.pairs


def cleared(layer):
    memory(layer)
    layer(torch.randn(2, 5, 12))
    layer.memory.clear()


def swapped(layer):
    layer.weight.data = torch.randn(7, 12)
    layer.bias.data = torch.randn(7)


CHANGES = {
    "config": lambda layer: setattr(layer, "config", VPSConfig(gamma=0.7, builder="sc")),
    "order": lambda layer: setattr(layer, "config", layer.config.replace(order=2)),
    "state": lambda layer: setattr(layer, "state", PolicyState()) or outcomes(layer),
    "outcomes": outcomes,
    "entropy": lambda layer: layer.state.set_entropy(2.9),
    "gradient": lambda layer: setattr(layer, "gradient", True),
    "memory": memory,
    "memory cleared": cleared,
    "own gamma": lambda layer: setattr(layer, "gamma", LayerGamma(-0.4)),
    "weight": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(10, 12), False)),
    "weight edited": lambda layer: layer.weight.mul_(-3.0),
    "data edited": lambda layer: layer.weight.data.mul_(-3.0),
    "data": lambda layer: setattr(layer.weight, "data", torch.randn(10, 12)),
    "data of another shape": swapped,
    "bias": lambda layer: setattr(layer, "bias", nn.Parameter(torch.randn(10), False)),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "training": lambda layer: layer.requires_grad_(True),
}


@pytest.mark.parametrize("backend", ["torch", "cpp", None])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change, backend):
    if backend == "cpp" and change.startswith("memory"):
        pytest.skip("pairs are computed by torch")
    layer, x = made()
    before = layer(x)
    assert layer.kept is not None
    CHANGES[change](layer)
    if backend is None:
        got, expected = layer(x), fresh(layer, x)
    else:
        with vps.backend(backend):
            got, expected = layer(x), fresh(layer, x)
    assert torch.equal(got, expected)
    if change not in ("training", "memory cleared"):
        assert got.shape != before.shape or not torch.equal(got, before)
    assert torch.equal(layer(x), got) or backend is not None


def test_other_inputs_and_surroundings():
    layer, x = made()
    layer(x)
    for other in (x.double(), torch.randn(5, 12), torch.randn(12), torch.randn(0, 12)):
        double = copy.deepcopy(layer).to(other.dtype)
        assert torch.equal(double(other), fresh(double, other))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, fresh(layer, x))
    model = nn.Sequential(layer)
    with vps.disabled(model):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    with vps.token_mask(torch.arange(10).view(2, 5) % 2 == 0):
        assert torch.equal(layer(x), fresh(layer, x))
    weights = {"weight": torch.randn(10, 12), "bias": torch.randn(10)}
    called = torch.func.functional_call(layer, weights, (x,))
    assert torch.equal(called, vps_linear(x, *weights.values(), layer.config))
    assert torch.equal(layer(x), fresh(layer, x))
    for bad, error in ((torch.randn(2, 11), ValueError), (x.long(), TypeError), (None, TypeError)):
        with pytest.raises(error):
            layer(bad)


def test_nothing_kept_is_copied_or_pickled():
    layer, x = made()
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        if other.weight is not layer.weight:
            assert other.kept is None
        other.weight = nn.Parameter(-other.weight, requires_grad=False)
        assert torch.equal(other(x), fresh(other, x))
    assert torch.equal(layer(x), y)
    plain = nn.Sequential(layer)
    vps.unpatch(plain)
    assert "kept" not in vars(plain[0])


def test_query_and_key_see_changes_too():
    torch.manual_seed(0)
    block = nn.Module()
    block.head_dim, block.q_proj, block.k_proj = 4, nn.Linear(12, 16), nn.Linear(12, 8)
    block.forward = lambda x: (block.q_proj(x), block.k_proj(x))
    model = nn.Sequential(block).requires_grad_(False)
    assert vps.patch(model).coupled == ("0",)
    x = torch.randn(1, 3, 12)
    model(x)
    for change in ("own gamma", "weight edited", "outcomes", "gradient"):
        CHANGES[change](block.k_proj)
        got = model(x)
        block.q_proj.coupling.kept = None
        for y, expected in zip(got, model(x), strict=True):
            assert torch.equal(y, expected)


def test_nothing_of_a_layer_is_held():
    layer, x = made()
    layer(x)
    weight, state = weakref.ref(layer.weight), weakref.ref(layer.state)
    layer.weight = nn.Parameter(torch.randn(10, 12), requires_grad=False)
    layer.state = PolicyState()
    assert weight() is None and state() is None
    layer(x)
    weight = weakref.ref(layer.weight)
    layer.to("meta")
    assert weight() is None or weight().is_meta


def test_an_input_that_is_none_is_refused_after_a_call_as_before():
    layer, x = made()
    for _ in range(2):
        with pytest.raises(ValueError, match="x must be"):
            layer(torch.tensor(1.0))
        with pytest.raises(TypeError, match="dense tensor"):
            layer(torch.randn(5, 12).to_sparse())
        layer(x)


@pytest.mark.parametrize("names", [["q_proj"], ["k_proj"], ["q_proj", "k_proj"]])
def test_an_adapter_put_around_a_layer_that_has_run(names):
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    vps.patch(model, VPSConfig())
    ids = torch.arange(6).view(1, 6)
    model(ids)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))
    expected = adapted(ids).logits
    for layer in sharpened_layers(model).values():
        if layer.coupling is not None:
            layer.coupling.kept = None
        vars(layer).pop("kept", None)
    assert torch.equal(adapted(ids).logits, expected)


@pytest.mark.skipif(vps.backends()["cpp"] is not None, reason="needs the C++ backend")
def test_a_token_passes_few_files_and_calls():
    layer = VPSLinear.from_linear(nn.Linear(64, 64).requires_grad_(False), VPSConfig())
    x = torch.randn(1, 1, 64)
    seen = []

    def note(frame, event, argument):
        name = os.path.realpath(frame.f_code.co_filename)
        if event == "call" and name.startswith(ROOT + "vps"):
            seen.append(name)

    with torch.no_grad():
        for _ in range(3):
            layer(torch.randn(1, 1, 64))
        sys.setprofile(note)
        layer(x)
        sys.setprofile(None)
    assert len(seen) <= 15 and len(set(seen)) <= 5, seen
