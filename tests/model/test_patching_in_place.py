"""patch and unpatch change layers where they stand: no stale reference, no half-done failure."""

import warnings

import pytest
import torch
from tiny import draw, tiny
from torch import nn

import vps
from vps import VPSConfig


@pytest.fixture
def ids():
    return draw(2, 7, seed=1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
@torch.no_grad()
def test_layers_stay_the_objects_that_they_are(family, ids):
    """So references of every kind hold, taken before the patch or while it lasts."""
    model = tiny(family)
    plain = model(ids).logits
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters())
    report = vps.patch(model, VPSConfig(target_modules="all-linear", gamma=0.5))
    assert dict(model.named_modules()) == modules
    held = [model.get_submodule(name) for name in report.patched]  # by no module
    calls = []
    for layer in held:
        layer.register_forward_hook(lambda module, args, output: calls.append(module))
    assert not torch.equal(model(ids).logits, plain)
    assert {id(layer) for layer in calls} <= {id(layer) for layer in held} and calls
    vps.unpatch(model)
    calls.clear()
    assert dict(model.named_modules()) == modules
    assert all(now is parameters[name] for name, now in model.named_parameters())
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert all(type(layer).__module__.startswith(("torch.", "transformers.")) for layer in held)
    assert not any("forward" in vars(layer) or "config" in vars(layer) for layer in held)
    assert torch.equal(model(ids).logits, plain) and calls


@torch.no_grad()
def test_a_reference_held_outside_the_model_is_sharpened_and_plain_again():
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    held = {"both": nn.Sequential(shared, nn.Sequential(shared)), "list": [shared]}
    x = torch.randn(3, 6)
    plain = shared(x)
    vps.patch(held["both"], VPSConfig(target_modules="all-linear", gamma=0.5))
    sharpened = held["list"][0](x)
    assert not torch.equal(sharpened, plain)
    during = held["both"][1][0]
    vps.unpatch(held["both"])
    assert during is shared and type(during) is nn.Linear
    assert torch.equal(during(x), plain) and torch.equal(held["list"][0](x), plain)


@pytest.mark.parametrize("patched", [False, True])
@torch.no_grad()
def test_a_patch_that_fails_leaves_the_model_as_it_was(patched, monkeypatch, ids):
    model = tiny("llama")
    if patched:
        vps.patch(model, VPSConfig(gamma=0.7))
        vps.policy_state(model).record(True)
    expected = model(ids).logits
    before = {name: type(module) for name, module in model.named_modules()}
    seen = []

    def fails(module):
        seen.append(module)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return None

    monkeypatch.setattr(vps.layers.recognise, "check", fails)
    with pytest.raises(KeyboardInterrupt):
        vps.patch(model, VPSConfig(gamma=0.1))
    monkeypatch.setattr(vps.layers.recognise, "check", lambda module: "it is none")
    with pytest.raises(ValueError, match="none of the .* can be sharpened"):
        vps.patch(model, VPSConfig(gamma=0.1))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(model(ids).logits, expected)
    if patched:
        assert vps.policy_state(model).outcomes == (True,)


@torch.no_grad()
def test_refusals_under_warnings_as_errors_do_not_leave_half_a_patch(ids):
    model = tiny("llama")
    model.model.layers[0].mlp.extra = nn.Conv1d(3, 3, 1)
    config = VPSConfig(target_modules=["q_proj", "k_proj", "extra"])
    plain = model(ids).logits
    with pytest.warns(UserWarning, match="extra"):
        vps.patch(model, config)
    assert not torch.equal(model(ids).logits, plain)
    vps.unpatch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="extra"):
            vps.patch(model, config)
    assert torch.equal(model(ids).logits, plain)


@torch.no_grad()
def test_a_model_of_parts_that_were_patched_by_themselves():
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
    model = nn.Sequential(*parts, nn.Linear(6, 6))
    every = VPSConfig(target_modules="all-linear", gamma=0.5)
    for part in parts[:2]:
        vps.patch(part, every)
    with pytest.raises(ValueError, match=r"2 policy states.*vps\.patch"):
        vps.policy_state(model)
    for part in parts[:2]:  # what all hold alike stays
        vps.policy_state(part).record(True)
    assert len(vps.patch(model, every).patched) == 4
    assert vps.policy_state(model).outcomes == (True,)
    vps.unpatch(model)
    for part, improved in zip(parts, (True, False, True), strict=True):
        vps.patch(part, every)
        vps.policy_state(part).record(improved)
    vps.patch(model, every)
    assert vps.policy_state(model).outcomes == ()
    x = torch.randn(4, 6)
    expected = model(x)
    vps.unpatch(model)
    vps.patch(model, every)
    assert torch.equal(model(x), expected)
    vps.patch(parts[0], every.replace(gamma=0.1))  # a part of a patched model keeps its state
    assert vps.policy_state(parts[0]) is vps.policy_state(model)


@torch.no_grad()
def test_a_patch_that_fails_leaves_hooks_and_parts_as_they_were(ids, monkeypatch):
    """Those of a model of which one part is sharpened."""
    model = tiny("llama")
    vps.patch(model.model.layers[0], VPSConfig(gamma=0.9, tau=None))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    expected = model(ids, attention_mask=mask).logits
    kinds = {name: type(module) for name, module in model.named_modules()}
    monkeypatch.setattr(vps.layers.recognise, "check", lambda module: "it is none")
    with pytest.raises(ValueError, match="none of the"):
        vps.patch(model, VPSConfig(gamma=0.1))
    with pytest.raises(ValueError, match="match none of"):
        vps.patch(model, VPSConfig(target_modules=["other"]))
    with pytest.raises(ValueError, match=r"layers_to_transform \(9,\) match none .*blocks 0 to"):
        vps.patch(model, VPSConfig(layers_to_transform=[9]))
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)
    vps.unpatch(model.model.layers[0])
    assert torch.equal(model(ids, attention_mask=mask).logits, tiny("llama")(ids, mask).logits)


@torch.no_grad()
def test_a_bound_forward_that_was_taken_while_sharpened_is_plain_later():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    x = torch.randn(3, 6)
    plain = [layer(x) for layer in model]
    vps.patch(model, VPSConfig(target_modules="all-linear", gamma=0.5))
    bound = [layer.forward for layer in model]
    assert not any(torch.equal(call(x), y) for call, y in zip(bound, plain, strict=True))
    vps.unpatch(model)
    assert all(torch.equal(call(x), y) for call, y in zip(bound, plain, strict=True))


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


@torch.no_grad()
def test_a_layer_that_is_parametrized_while_sharpened_stays_so():
    torch.manual_seed(0)
    model, config = nn.Sequential(nn.Linear(6, 6)), VPSConfig(target_modules=["0"], gamma=0.5)
    x = torch.randn(3, 6)
    vps.patch(model, config)
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", Half())
    sharpened = model(x)
    for _ in range(2):
        vps.patch(model, config)
        torch.testing.assert_close(model(x), sharpened)
    plain = model[0].to_linear() if isinstance(model[0], vps.VPSLinear) else None
    vps.unpatch(model)
    expected = nn.functional.linear(x, model[0].parametrizations.weight.original / 2, model[0].bias)
    torch.testing.assert_close(model(x), expected)
    assert plain is None or torch.equal(plain(x), expected)
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_attributes_of_a_layer_come_back():
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(3, 6)
    own = dict.fromkeys(("config", "state", "gamma", "memory", "gradient", "coupling"), 0.1)
    for name, value in own.items():
        setattr(model[0], name, value)
    before = dict(vars(model[0]))
    vps.patch(model, VPSConfig(target_modules=["0"], gamma=0.5))
    model(x)
    vps.unpatch(model)
    assert vars(model[0]) == before
