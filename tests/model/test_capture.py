"""Captured outputs and gradients against plain autograd, and what the block leaves behind."""

import gc
import weakref

import pytest
import torch
from cases import held_constant
from tiny import draw, tiny
from torch import nn

import vps
from vps import VPSConfig, VPSLinear, reference
from vps.model.patching import sharpened_layers

IDS = draw(2, 7, seed=1)


def patched(dtype=torch.float64, layers=2, **settings):
    model = tiny(
        dtype=dtype, times=8, hidden_size=16, intermediate_size=24, head_dim=4,
        num_hidden_layers=layers,
    )  # fmt: skip
    vps.patch(model, VPSConfig(**settings))
    return model


def loss_of(model, **inputs):
    return model(IDS, **inputs).logits.float().logsumexp(-1).square().mean()


def means(model, **inputs):
    """``{name: (w, g)}``, captured in one pass and copied."""
    with vps.capture(model) as captured:
        loss_of(model, **inputs).backward()
        return {
            name: (record.output_mean.clone(), record.gradient_mean.clone())
            for name, record in captured.items()
        }


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def retained(model, mask=None):
    """The same from outputs that autograd itself retains."""
    outputs, handles = {}, []
    for name, layer in sharpened_layers(model).items():

        def keep(layer, args, y, name=name):
            y.retain_grad()
            outputs[name] = y

        handles.append(layer.register_forward_hook(keep))
    loss_of(model, attention_mask=mask).backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    counted = torch.ones_like(IDS, dtype=torch.bool) if mask is None else mask.bool()
    return {name: (y[counted].mean(0), y.grad[counted].mean(0)) for name, y in outputs.items()}


def assert_same(found, expected, count=14):
    assert found.keys() == expected.keys() and len(found) == count
    for name in expected:
        for one, other in zip(found[name], expected[name], strict=True):
            assert other.norm() > 0 and (one - other).norm() <= 1e-9 * other.norm(), name


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_means_are_those_of_autograd(frozen, padded):
    model = patched()
    mask = torch.ones_like(IDS)
    if padded:
        mask[1, :3] = 0
    expected = retained(model, mask)
    model.requires_grad_(not frozen)
    before = hooks(model)
    assert_same(means(model, attention_mask=mask), expected)
    assert hooks(model) == before
    assert all((p.grad is None) == frozen for p in model.parameters())
    assert all(p.requires_grad != frozen for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointed_blocks_are_recorded_once(frozen, reentrant):
    model = patched()
    expected = means(model)
    model.zero_grad()
    model.requires_grad_(not frozen).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    handle = sharpened_layers(model)["model.layers.0.mlp.up_proj"].register_forward_hook(
        lambda *_: calls.append(1)
    )
    found = means(model)
    handle.remove()
    assert len(calls) == 2  # the block did run again
    assert_same(found, expected)


@pytest.mark.parametrize("how", ["wrapped", "in place", "function"])
def test_compiled_inside_the_block(how):
    model = patched(layers=1, target_modules=("q_proj", "k_proj", "down_proj"))
    expected = means(model)
    torch.compiler.reset()
    target = model
    if how == "in place":
        model.compile(backend="eager")
    elif how == "wrapped":
        target = torch.compile(model, backend="eager")
    with vps.capture(target) as captured:
        if how == "function":
            torch.compile(lambda: loss_of(model), backend="eager")().backward()
        else:
            loss_of(target).backward()
        found = {
            name.removeprefix("_orig_mod."): (r.output_mean, r.gradient_mean)
            for name, r in captured.items()
        }
    assert_same(found, expected, count=3)


def test_compiled_before_the_block_is_an_error():
    model = patched()
    torch.compiler.reset()
    compiled = torch.compile(lambda: loss_of(model), backend="eager")
    compiled()
    with pytest.raises(RuntimeError, match="torch.compile"), vps.capture(model):
        compiled()
    with pytest.raises(RuntimeError, match="no sharpened layer was recorded"), vps.capture(model):
        pass


def test_whole_tensors_and_several_calls():
    layer = VPSLinear(6, 5, config=VPSConfig(scope="token"), dtype=torch.float64)
    model = nn.Sequential(layer, nn.Linear(5, 6, dtype=torch.float64), layer).requires_grad_(False)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = layer(x), model(x)
    with vps.capture(model, tensors=True) as captured:
        assert captured["0"].output_mean is None and captured["0"].gradient_mean is None
        model(x).square().sum().backward()
        record = captured["0"]
        assert [tuple(y.shape) for y in record.outputs] == [(4, 5), (4, 5)]
        first, last = record.outputs
        assert torch.equal(first, expected[0]) and torch.equal(last, expected[1])
        assert torch.allclose(record.gradients[0], 2 * last)  # backwards: last call first
        assert torch.allclose(record.output_mean, torch.cat([first, last]).mean(0))
        assert torch.allclose(record.gradient_mean, torch.cat(record.gradients).mean(0))
    assert record.outputs == record.gradients == [] and record.output_mean is None


def test_nothing_stays_behind():
    model = patched().requires_grad_(False)
    before = hooks(model)
    with pytest.raises(KeyError), vps.capture(model, tensors=True) as captured:
        loss = loss_of(model)
        output = weakref.ref(captured["model.layers.0.mlp.up_proj"].outputs[0])
        assert output() is not None
        raise KeyError
    assert hooks(model) == before and output() is None
    loss.backward()  # the graph outlives the block, the hooks do not
    assert all(record.gradient_mean is None for record in captured.values())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad(), vps.capture(model) as captured:
        loss_of(model)
        assert all(r.output_mean is not None for r in captured.values())
        assert all(r.gradient_mean is None for r in captured.values())
    with pytest.raises(ValueError, match="no sharpened layer"), vps.capture(nn.Linear(2, 2)):
        pass


def test_memory_does_not_grow():
    model = patched().requires_grad_(False)

    def tensors():
        gc.collect()
        return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())

    means(model)
    before = tensors()
    for _ in range(3):
        means(model)
    assert tensors() <= before


class Literal(nn.Module):
    """A linear layer by the reference, whose autograd holds selection, core, B and γ constant."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def result(self, x):
        both = [reference.Projection(one.weight) for one in self.layer.deciding()]
        if len(both) == 1:
            return reference.vps_linear(x, self.layer.weight, config=self.layer.config)
        pair = self.layer.coupling
        results = reference.coupled_vps_linear(
            x, *both, heads=pair.heads, kv_heads=pair.kv_heads, config=self.layer.config
        )
        return results[0 if self.layer is pair.query else 1]

    def forward(self, x):
        return held_constant(x, self.layer.weight, self.result(x.detach()))


@pytest.mark.parametrize("builder", ["sk", "sc"])
@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_backward_agrees_with_autograd_of_the_reference(builder, scope):
    def gradient_of(model):
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embeds).logits.double().logsumexp(-1).square().mean().backward()
        return embeds.grad.double().flatten()

    settings = dict(builder=builder, scope=scope)
    found = gradient_of(patched(torch.float32, **settings))
    literal = patched(torch.float32, **settings).double()
    for name, layer in sharpened_layers(literal).items():
        literal.set_submodule(name, Literal(layer))
    expected = gradient_of(literal)
    plain = patched(torch.float32, **settings)
    vps.unpatch(plain)
    similarity = torch.nn.functional.cosine_similarity
    assert similarity(found, expected, dim=0) >= 0.999999
    assert similarity(gradient_of(plain), expected, dim=0) < 0.999
