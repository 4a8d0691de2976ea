"""PEFT adapters around sharpened layers: always the sharpening of the merged weights."""

import copy
import pickle

import pytest
import torch
from adapter_cases import IDS, TARGETS, adapted, fill, lora, merged, same
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tiny import number_tokenizer, settings, tiny

import vps
from vps import VPSConfig
from vps.layers.opaque_layer import sharpened_by
from vps.model.patching import sharpened_layers

pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS = {
    "default": VPSConfig(),
    "sc": VPSConfig(builder="sc"),
    "sc, second order, spectral, token": VPSConfig(
        builder="sc", order=2, clip="spectral", scope="token"
    ),
    "uncoupled, batch, clamp": VPSConfig(qk_coupling=False, scope="batch", clamp=0.1),
    "random": VPSConfig(builder="random"),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_equals_the_merged_weights(order, name):
    config = SETTINGS[name]
    model, expected = adapted(order, config), merged(config)(IDS).logits
    plain = tiny("llama")
    without = plain(IDS).logits
    assert not same(model, without, bound=0.1)
    assert same(model, expected)
    assert len(sharpened_layers(model)) == 14
    with vps.disabled(model):
        assert same(model, fill(get_peft_model(tiny("llama"), lora()))(IDS).logits, bound=0)
    model.merge_adapter()
    assert same(model, expected)
    model.unmerge_adapter()
    assert same(model, expected)
    vps.patch(plain, config)
    base = plain(IDS).logits
    with model.disable_adapter():
        assert same(model, base)
    assert same(model, expected)
    model = model.merge_and_unload()
    assert same(model, expected) and len(sharpened_layers(model)) == 14
    vps.unpatch(model)
    assert same(model, expected, bound=0) is False and not sharpened_layers(model)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "adapter",
    [
        lora(target_modules="all-linear", lora_bias=True),
        lora(use_dora=True),
        lora(use_rslora=True, target_modules=["k_proj", "o_proj"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["bias", "dora", "rslora", "ia3"],
)
@torch.no_grad()
def test_kinds_of_adapters(order, adapter):
    family = "qwen2" if getattr(adapter, "lora_bias", False) else "llama"
    if family == "qwen2":
        adapter = lora(target_modules=["q_proj", "k_proj"], lora_bias=True)
    for config in (VPSConfig(), VPSConfig(builder="sc", scope="token")):
        expected = merged(config, copy.deepcopy(adapter), family=family)(IDS).logits
        assert same(adapted(order, config, copy.deepcopy(adapter), family), expected, bound=1e-7)


@pytest.mark.parametrize("order", ["before", "after"])
@torch.no_grad()
def test_several_adapters(order):
    config = VPSConfig()
    model = adapted(order, config)
    model.add_adapter("other", lora(r=2, target_modules=["q_proj", "down_proj"]))
    fill(model, seed=5)
    expected = {}
    for names in ("default", "other", ["default", "other"]):
        twin = get_peft_model(tiny("llama"), lora())
        twin.add_adapter("other", lora(r=2, target_modules=["q_proj", "down_proj"]))
        for parameter, value in zip(twin.parameters(), model.parameters(), strict=True):
            parameter.data.copy_(value.data)
        chosen = [names] if isinstance(names, str) else names
        twin = twin.eval().merge_and_unload(adapter_names=chosen)
        vps.patch(twin, config)
        expected[str(names)] = twin(IDS).logits
    for names in ("other", "default", ["default", "other"], "default"):
        model.base_model.set_adapter(names)
        assert same(model, expected[str(names)])
    assert len({float(logits.sum()) for logits in expected.values()}) == 3
    with pytest.raises(TypeError, match="adapter_names"):
        model(IDS, adapter_names=["default", "other"])


@torch.no_grad()
def test_adapters_come_and_go_and_settings_stay():
    model = tiny("llama")
    vps.patch(model)
    plain = model(IDS).logits
    wrapped = get_peft_model(model, lora())
    config = VPSConfig(gamma=0.2, adaptive_gamma=False, builder="sk")
    vps.set_config(wrapped, config)
    vps.policy_state(wrapped).record(True)
    model = wrapped.unload()
    assert all(layer.config == config for layer in sharpened_layers(model).values())
    assert not same(model, plain)
    vps.set_config(model, VPSConfig())
    vps.policy_state(model).reset()
    assert same(model, plain, bound=0)
    layer = model.model.layers[0].self_attn
    assert layer.q_proj.coupling.query is layer.q_proj
    twin = fill(get_peft_model(pickle.loads(pickle.dumps(model)), lora()))
    assert same(twin, merged(VPSConfig())(IDS).logits)
    twin = copy.deepcopy(twin)
    assert same(twin, merged(VPSConfig())(IDS).logits)
    vps.unpatch(twin)
    assert same(twin, fill(get_peft_model(tiny("llama"), lora()))(IDS).logits, bound=0)


@torch.no_grad()
def test_saved_adapters_load_into_a_sharpened_model(tmp_path):
    adapted("after", VPSConfig()).save_pretrained(tmp_path)
    model = tiny("llama")
    vps.patch(model)
    assert same(PeftModel.from_pretrained(model, tmp_path).eval(), merged(VPSConfig())(IDS).logits)


@torch.no_grad()
def test_conv1d():
    adapter = lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    config = settings("gpt2", builder="sc")
    expected = merged(config, copy.deepcopy(adapter), family="gpt2")(IDS).logits
    for order in ("before", "after"):
        model = adapted(order, config, copy.deepcopy(adapter), "gpt2")
        assert same(model, expected)


def test_training_an_adapter_takes_the_update_for_a_constant():
    """∂L/∂W of SPEC §6: the adapter's gradient is that of the base product alone."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(9, 8, dtype=torch.float64))
    config = VPSConfig(target_modules=["0"])
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 8, dtype=torch.float64)
    model = fill(get_peft_model(model, lora(target_modules=["0"])))
    model(x).backward(g)
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = [p.grad.clone() for p in trained]
    W = model.base_model.model[0]
    W = W.base_layer.weight + W.get_delta_weight("default")
    bias = model.base_model.model[0].base_layer.bias
    x.grad = None
    vps.vps_linear(x, W.detach(), bias, config).backward(g)
    expected = x.grad.clone()
    x.grad = None
    model.zero_grad()
    vps.patch(model, config)
    model(x).backward(g)
    torch.testing.assert_close(x.grad, expected)
    assert len(trained) == 2
    for parameter, gradient in zip(trained, plain, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("order", ["before", "after"])
def test_capture_and_statistics_see_each_layer_once(order):
    model = adapted(order, VPSConfig())
    with vps.capture(model) as captured:
        model(IDS).logits.sum().backward()
        assert len(captured) == 14 and not any("base_layer" in name for name in captured)
        assert all(record.gradient_mean is not None for record in captured.values())
        name = next(name for name in captured if name.endswith("layers.1.self_attn.q_proj"))
        assert captured[name].output_mean.shape == (32,)
    from vps.model.statistics import measure

    ours = measure(model, {"input_ids": IDS})
    theirs = measure(merged(VPSConfig()), {"input_ids": IDS})
    for one, other in zip(ours, theirs, strict=True):
        assert one.name.endswith(other.name)
        for field in ("gamma", "rank", "energy", "relative_size"):
            assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-6)
    assert sharpened_by(model.get_submodule(name)).memory is None


@torch.no_grad()
def test_controls_of_an_adapted_model():
    from vps.evaluation.controls import CONTROLS, control

    model, other = adapted("after", VPSConfig()), merged(VPSConfig())
    for name in CONTROLS:
        with control(model, name, seed=3), control(other, name, seed=3):
            assert same(model, other(IDS).logits, bound=1e-6), name


@torch.no_grad()
def test_an_adapter_that_is_no_linear_map_is_refused():
    from peft.tuners.tuners_utils import BaseTunerLayer

    class Gated(torch.nn.Module, BaseTunerLayer):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x):
            return self.base_layer(x) * x.mean(-1, keepdim=True).sigmoid()

    config = VPSConfig(target_modules=["0"])
    model = torch.nn.Sequential(torch.nn.Linear(9, 8))
    vps.patch(model, config)
    model[0] = Gated(model[0])
    with pytest.raises(RuntimeError, match="a Gated cannot be sharpened: .* not a linear map"):
        model(torch.randn(3, 9))
    model = torch.nn.Sequential(Gated(torch.nn.Linear(9, 8)))
    with pytest.raises(ValueError, match="not a linear map"):
        vps.patch(model, config)
    assert "_sharpened" not in vars(model[0]) and type(model[0].base_layer) is torch.nn.Linear


@pytest.mark.parametrize("kind", ["adapter", "nf4"])
def test_refinement(kind):
    """Gradients, L-BFGS and statistics of a refinement, and everything back after it."""
    from matrix_cases import llama, quantized, replaced

    if kind == "adapter":
        model = adapted("after", VPSConfig())
    else:
        vps.patch(model := replaced(llama(), quantized(kind)))
    with torch.no_grad():
        before = model(IDS).logits
    options = dict(iterations=3, max_new_tokens=3, weights={"numeric": 1.0})
    result = vps.refine(model, number_tokenizer(), "1 2 3", "3 14 15 9", **options)
    assert [entry.builder for entry in result.iterations] == ["base", "sc", "sc"]
    assert all(entry.gamma > 0 for entry in result.iterations[1:])
    assert result.iterations[2].surrogate_loss > 0
    with torch.no_grad():
        assert same(model, before, bound=0)


@torch.no_grad()
def test_autocast():
    model, other = (m.float() for m in (adapted("after", VPSConfig()), merged(VPSConfig())))
    with torch.autocast("cpu", torch.bfloat16), vps.backend("torch"):
        logits, expected = model(IDS).logits, other(IDS).logits
    with vps.disabled(model):
        change = (model(IDS).logits - model(IDS).logits.bfloat16()).norm()
    assert logits.dtype == expected.dtype
    assert (logits - expected).norm() <= 0.1 * expected.norm() + change


@pytest.mark.parametrize("builder", ["sk", "sc"])
def test_gradient_checkpointing_changes_no_gradient(builder):
    model = tiny("llama")
    vps.patch(model, VPSConfig(builder=builder))
    config = LoraConfig(target_modules=[*TARGETS, "down_proj"], r=2, init_lora_weights=False)
    model = get_peft_model(model, config).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
