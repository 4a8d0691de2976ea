"""Adapters that are merged, switched off, mixed or that scale a bias, around sharpened layers."""

import copy

import pytest
import torch
from adapter_cases import IDS, TARGETS, adapted, fill, lora, same
from peft import IA3Config, get_peft_model
from tiny import settings, tiny

import vps
from vps import VPSConfig

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("qwen2", lora(lora_bias=True)),
        ("qwen2", lora(use_dora=True)),
        ("opt", lora(lora_bias=True, target_modules=["q_proj", "fc1"])),
        ("qwen2", IA3Config(target_modules=TARGETS, feedforward_modules=[])),
        ("gpt2", lora(lora_bias=True, target_modules=["c_attn"], fan_in_fan_out=True)),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
@torch.no_grad()
def test_a_merged_adapter_is_switched_off_and_on(order, family, adapter):
    """PEFT unmerges in the forward of the layer, which must happen to the layer itself."""
    config = settings(family)
    bound = 1e-5 if isinstance(adapter, IA3Config) else 1e-9  # (IA)³ divides by its scale + 1e-8
    model = adapted(order, config, copy.deepcopy(adapter), family)
    plain = tiny(family)
    vps.patch(plain, config)
    sharpened, adapter_on = plain(IDS).logits, model(IDS).logits
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.merge_adapter()
    assert same(model, adapter_on, bound=bound)
    with model.disable_adapter():
        assert same(model, sharpened, bound=bound)
    assert same(model, adapter_on, bound=bound)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, before[name], rtol=0, atol=bound)
    vps.unpatch(model)
    with model.disable_adapter():
        assert same(model, tiny(family)(IDS).logits, bound=bound)


@torch.no_grad()
def test_mixed_batches_are_refused_and_taken_where_sharpening_is_off():
    model = tiny("llama")
    vps.patch(model)
    model = get_peft_model(model, lora())
    model.add_adapter("other", lora(r=2))
    model = fill(model)
    names = ["default", "other"]
    plain = get_peft_model(tiny("llama"), lora())
    plain.add_adapter("other", lora(r=2))
    plain = fill(plain)
    expected = plain(input_ids=IDS, adapter_names=names).logits
    with pytest.raises(TypeError, match="adapter_names.*other weights.*one weight"):
        model(input_ids=IDS, adapter_names=names)
    with vps.disabled(model):
        assert torch.equal(model(input_ids=IDS, adapter_names=names).logits, expected)
    vps.set_config(model, VPSConfig(gamma=0))
    assert torch.equal(model(input_ids=IDS, adapter_names=names).logits, expected)
    vps.set_config(model, VPSConfig())
    with pytest.raises(ValueError, match="Length of `adapter_names`"):  # PEFT's own reason
        model(input_ids=IDS, adapter_names=names[:1])
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(input_ids=IDS, adapter_names=names)


class Scaled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Deaf(torch.nn.Linear):
    """Leaves out its bias."""

    def forward(self, x):
        return x @ self.weight.t()


@pytest.mark.parametrize("builder", ["sk", "sc"])
@torch.no_grad()
def test_a_bias_that_is_no_summand_of_the_output(builder):
    """H is the output less that of zeros; nothing of the bias is lost or doubled."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    config = VPSConfig(target_modules=["0"], builder=builder, gamma=0.5)
    for make, factor in ((Scaled, 2), (Deaf, 1)):
        layer = make(12, 10).double()
        bias = layer.bias if make is Scaled else None
        expected = vps.vps_linear(
            x, factor * layer.weight, None if bias is None else 2 * bias, config
        )
        model = torch.nn.Sequential(layer)
        vps.patch(model, config)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-10)
        vps.unpatch(model)
    adapter = IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[])
    config = VPSConfig(builder=builder)
    for order in ("before", "after"):
        model = adapted(order, config, copy.deepcopy(adapter), "qwen2")
        plain, ids = fill(get_peft_model(tiny("qwen2"), copy.deepcopy(adapter))), IDS
        expected = plain(ids).logits
        with vps.disabled(model):
            assert same(model, expected)
        small = config.replace(gamma=1e-12)
        vps.set_config(model, small)
        assert same(model, expected, bound=1e-8)
        model.merge_adapter()
        plain.merge_adapter()
        assert same(model, plain(ids).logits, bound=1e-8)
