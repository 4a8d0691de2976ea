"""Layers of one x share the launches of a step; in the interpreter each has the bits of its own."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from tiny import tiny
from torch import nn

import vps
from vps.layers import pairing
from vps.masking import STATE
from vps.model.patching import sharpened_layers

pytestmark = pytest.mark.skipif(
    vps.backends()["triton"] is not None or torch.cuda.is_available(),
    reason="counts in Triton's interpreter",
)
CONFIG = vps.VPSConfig(gamma=0.5, builder="sk", target_modules="all-linear")


@pytest.fixture(autouse=True)
def by_triton():
    with vps.backend("triton"), torch.no_grad():
        yield
    assert not STATE.readings


@pytest.fixture
def launches(monkeypatch):
    """Count kernels by name."""
    from triton.runtime.interpreter import GridExecutor

    found, run = Counter(), GridExecutor.__call__

    def count(kernel, *arguments, **options):
        found[kernel.fn.__name__] += 1
        return run(kernel, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", count)
    return found


class Block(nn.Module):
    """Two layers of one x, as an MLP has them."""

    def __init__(self, width=24):
        super().__init__()
        self.gate, self.up = nn.Linear(16, width), nn.Linear(16, width, bias=False)
        self.between = None
        self.calls_up = True

    def forward(self, inputs_embeds, attention_mask=None):
        x = self.x = inputs_embeds
        y = self.gate(x)
        if self.between is not None:
            self.between(self)
        return y, self.up(x) if self.calls_up else None


def patched(config=CONFIG, **options):
    torch.manual_seed(0)
    model = Block(**options).requires_grad_(False)
    vps.patch(model, config)
    return model


def plain(model, x):
    """What each layer computes by itself."""
    return model.gate(x), model.up(x.clone())


def same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_two_layers_cost_two_launches(launches):
    model = patched()
    for turn in range(5):
        x = torch.randn(2, 1, 16)
        wanted = plain(model, x)
        launches.clear()
        same(model(x), wanted)
        expected = Counter(chunk_kernel=1, gemv_kernel=1, apply_kernel=1)
        if turn == 0:  # that the second reads x too is not known yet
            expected += Counter(gemv_kernel=1, apply_kernel=1)
        assert launches == expected


@pytest.mark.parametrize("config", [{}, {"qk_coupling": False}, {"scope": "token"}], ids=str)
def test_a_block_of_a_model(launches, monkeypatch, config):
    """Query, key and value in one product, gate and up in another."""
    tokens = 3 if config.get("scope") == "token" else 1
    model = tiny("qwen2", torch.float32, num_hidden_layers=1).requires_grad_(False)
    vps.patch(model, vps.VPSConfig(**config))
    ids = torch.arange(2 * tokens).view(2, tokens)
    for _ in range(2):
        model(ids, use_cache=False)
    launches.clear()
    logits = model(ids, use_cache=False).logits
    assert launches["gemv_kernel"] == launches["apply_kernel"] == 4  # q k v, o, gate up, down
    assert launches["chunk_kernel"] == 4
    monkeypatch.setattr(pairing, "_ahead", lambda *_: None)
    launches.clear()
    assert torch.equal(model(ids, use_cache=False).logits, logits)
    assert launches["gemv_kernel"] == (7 if config.get("qk_coupling") is False else 6)


def test_generation_has_the_same_bits(monkeypatch):
    model = tiny("llama", torch.float32).requires_grad_(False)
    vps.patch(model, vps.VPSConfig(gamma=0.3))
    ids, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    together = model.generate(ids, **options)
    monkeypatch.setattr(pairing, "_ahead", lambda *_: None)
    alone = model.generate(ids, **options)
    assert torch.equal(together.sequences, alone.sequences)
    same(together.scores, alone.scores)


def learned(**options):
    model = patched(**options)
    for _ in range(3):
        model(torch.randn(1, 1, 16))
    assert model.gate.kept.readers[0]() is model.up
    return model


def test_a_new_weight_counts_at_once(launches):
    model = learned()
    x = torch.randn(1, 1, 16)
    before = model(x)
    model.up.weight.data.mul_(2)
    after = model(x)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    same(after, plain(model, x))


@pytest.mark.parametrize("edit", ["in place", "another"])
def test_an_edit_between_the_two(edit):
    model = learned()

    def between(model):
        if edit == "in place":
            model.up.weight.mul_(2)
        else:
            model.up.weight = nn.Parameter(model.up.weight * 2, False)

    model.between = between
    x = torch.randn(1, 1, 16)
    found = model(x)
    model.between = None
    same(found, plain(model, x))


def test_x_edited_between_the_two():
    model = learned()
    model.between = lambda model: model.x.add_(1)
    x = torch.randn(1, 1, 16)
    first = model.gate(x.clone())
    found = model(x)
    same(found, (first, model.up(x.clone())))


@pytest.mark.parametrize("hook", ["pre", "always"])
def test_a_hook_before_the_second(hook, launches):
    model = learned()
    seen = []

    def edit(module, *_):
        seen.append(module)
        module.weight.data.mul_(2)

    if hook == "pre":
        model.up.register_forward_pre_hook(edit)
    else:
        handle = nn.modules.module.register_module_forward_pre_hook(
            lambda module, *_: edit(module) if module is model.up else None
        )
    x = torch.randn(1, 1, 16)
    found = model(x)
    if hook == "always":
        handle.remove()
    model.up._forward_pre_hooks.clear()
    assert seen == [model.up]
    same(found, plain(model, x))


def test_a_layer_that_does_not_come(launches):
    """It is computed ahead once more, then never."""
    model = learned()
    model.calls_up = False
    for _ in range(3):
        launches.clear()
        model(torch.randn(1, 1, 16))
        assert launches["gemv_kernel"] == 1
        assert model.gate.kept.readers is None
    model.calls_up = True
    x = torch.randn(1, 1, 16)
    same(model(x), plain(model, x))


@pytest.mark.parametrize("other", ["gamma", "config", "disabled", "off", "plain"])
def test_a_second_layer_of_its_own_settings(other):
    model = learned()
    x = torch.randn(1, 1, 16)
    if other == "gamma":
        model.up.gamma = vps.algorithm.policy.LayerGamma(0.2)
        model.up.kept = None
    elif other == "config":
        vps.set_config(model, CONFIG.replace(gamma=0.1, rank=2))
    elif other == "disabled":
        with vps.disabled(model):
            same(model(x), [nn.functional.linear(x, m.weight, m.bias) for m in model.children()])
    elif other == "off":
        vps.set_config(model, CONFIG.replace(gamma=0.0))
    else:
        vps.unpatch(model)
    for _ in range(3):
        same(model(x), plain(model, x))


def test_with_a_gradient(launches):
    model = learned()
    x = torch.randn(1, 1, 16, requires_grad=True)
    with torch.enable_grad():
        found = model(x)
        sum(y.sum() for y in found).backward()
    assert x.grad is not None
    same(found, plain(model, x.detach()))


def test_nothing_stays_when_the_model_is_done():
    model = learned()
    x = torch.randn(1, 1, 16)
    found = model(x)
    model.x = None
    refs = [weakref.ref(x), *map(weakref.ref, found)]
    del x, found
    model(torch.randn(1, 1, 16))  # of an operator, the selection of the last x is kept
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def test_outside_a_model_nothing_is_computed_ahead(launches):
    model = learned()
    x = torch.randn(1, 1, 16)
    launches.clear()
    model.gate(x)
    assert launches["gemv_kernel"] == 1
    model.up.weight.data.mul_(3)
    same([model.up(x)], [model.up(x.clone())])


def test_copies_and_pickles_learn_anew():
    import copy

    model = learned()
    twin = copy.deepcopy(model)
    x = torch.randn(1, 1, 16)
    for _ in range(3):
        same(twin(x), model(x))
    assert twin.gate.kept.readers[0]() is twin.up


def test_many_tokens_are_left_alone(launches):
    model = learned()
    launches.clear()
    x = torch.randn(17, 1, 16)
    same(model(x), plain(model, x))
    assert not launches["gemv_kernel"]
    assert sharpened_layers(model)


def test_a_prefill_teaches(launches):
    """So the first step after it is computed as all that follow, and again in another run."""
    model = patched()
    model(torch.randn(1, 6, 16))
    launches.clear()
    model(torch.randn(1, 1, 16))
    assert launches["gemv_kernel"] == launches["apply_kernel"] == 1
