"""Layers of bitsandbytes and torchao: right, no larger, and never turned into plain weights."""

import copy
import gc
import pickle

import pytest
import torch
from matrix_cases import IDS, dense, llama, oracle, quantized, replaced, run, weights_of
from torch import nn

import vps
from vps import VPSConfig, VPSLinear, reference
from vps.layers.opaque_layer import sharpened_by

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ["nf4", "fp4", "int8", "torchao int8", "torchao int4", "torchao fp8"]


def held():
    """Bytes of the storages of all tensors of this process, by address."""
    gc.collect()
    tensors = [
        item
        for item in gc.get_objects()
        if type(item) in (torch.Tensor, nn.Parameter)
        and not torch._is_functional_tensor(item)
        and not torch._C._functorch.is_functorch_wrapped_tensor(item)
    ]  # the graphs of compiled tests keep such tensors, which have no memory
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_memory_within_a_hundredth_plus_the_norms(kind):
    def quantize():
        model = replaced(llama(), quantized(kind))
        run(model, IDS)  # bitsandbytes moves its state at the first call
        return model

    vps.patch(warm := quantize())
    run(warm, IDS)  # constants that vps keeps
    model = quantize()
    before = held()
    state = {name: tensor.nbytes for name, tensor in model.state_dict().items()}
    vps.patch(model)
    run(model, IDS)
    after = held()
    layers = vps.model.patching.sharpened_layers(model).values()
    norms = 4 * sum(layer.widths[0] for layer in layers)
    own = sum(state.values())
    assert sum(after.values()) <= sum(before.values()) + 0.01 * own + norms
    assert sum(after.values()) >= sum(before.values()) + norms  # else this sees nothing
    added = [size for storage, size in after.items() if storage not in before]
    assert max(added) <= 4 * max(layer.widths[0] for layer in layers)  # no weight is dense
    assert {name: tensor.nbytes for name, tensor in model.state_dict().items()} == state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_one_layer(kind, dtype):
    torch.manual_seed(0)
    layer = quantized(kind)(nn.Linear(64, 96, dtype=dtype))
    x = torch.randn(2, 5, 64, dtype=dtype)
    plain, (W, b) = layer(x), dense(layer)
    model = nn.Sequential(layer)
    for config in (VPSConfig(), VPSConfig(builder="sc"), VPSConfig(order=2, clip="spectral")):
        vps.patch(model, config.replace(target_modules=["0"]))
        update = (model(x) - plain).double()
        expected = reference.vps_linear(x.double(), W, b, config=config).y
        expected -= nn.functional.linear(x.double(), W, b)
        bound = 1e-5 if dtype == torch.float32 else 0.1
        if kind == "int8":  # it rounds x
            bound = 0.1
        assert (update - expected).norm() <= bound * expected.norm()
        with vps.disabled(model):
            assert torch.equal(model(x), plain)
    sharpened = model(x)
    twins = [copy.deepcopy(model)]
    if "torchao" not in kind:  # whose layers cannot be pickled
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert torch.equal(twin(x), sharpened)
    vps.unpatch(model)
    assert torch.equal(model(x), plain) and layer is model[0]


@pytest.mark.parametrize("builder", ["sk", "sc"])
@torch.no_grad()
def test_nf4_packed_for_avx512(builder):
    """In evaluation mode such CPUs repack the weight, and then it has no backward pass."""
    model = replaced(llama(), quantized("nf4"))
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = bitsandbytes.functional.has_avx512bf16()
    config = VPSConfig(builder=builder)
    plain = run(model, IDS)
    known = weights_of(model)
    base = run(oracle(known, VPSConfig(gamma_bounds=(0, 0))), IDS)
    noise = max(float((a - b).norm() / b.norm()) for a, b in zip(plain, base, strict=True))
    vps.patch(model, config)
    for logits, expected in zip(run(model, IDS), run(oracle(known, config), IDS), strict=True):
        assert (logits - expected).norm() <= (20 * noise + 1e-5) * expected.norm()
    with vps.disabled(model):
        for logits, right in zip(run(model, IDS), plain, strict=True):
            assert torch.equal(logits, right)


@torch.no_grad()
def test_rows_of_dynamically_quantized_layers():
    layer = quantized("torchao dynamic")(nn.Linear(64, 96))
    model, x = nn.Sequential(layer), torch.randn(4, 64)
    W, b = dense(layer)
    with pytest.warns(UserWarning, match="no backward pass"):
        vps.patch(model, VPSConfig(target_modules=["0"], builder="sc"))
    expected = reference.vps_linear(x.double(), W, b, config=VPSConfig(builder="sc")).y
    torch.testing.assert_close(model(x).double(), expected, rtol=0, atol=0.05)


def test_gradients_reach_x():
    """Through the quantized layer's own backward pass."""
    torch.manual_seed(0)
    for kind in ("nf4", "int8", "torchao int8"):
        layer = quantized(kind)(nn.Linear(64, 96))
        W, b = dense(layer, torch.float32)
        config = VPSConfig(builder="sc")
        model = nn.Sequential(layer)
        vps.patch(model, config.replace(target_modules=["0"]))
        x = torch.randn(2, 5, 64, requires_grad=True)
        g = torch.randn(2, 5, 96)
        (found,) = torch.autograd.grad(model(x), x, g)
        (expected,) = torch.autograd.grad(vps.vps_linear(x, W, b, config), x, g)
        bound = 0.1 if kind == "int8" else 1e-5
        assert (found - expected).norm() <= bound * expected.norm(), kind


@torch.no_grad()
def test_quantized_after_patching():
    """A VPSLinear whose weight becomes a packed tensor is sharpened through its forward."""
    import torchao.quantization as torchao

    torch.manual_seed(0)
    linear, x = nn.Linear(64, 96), torch.randn(4, 64)
    model = nn.Sequential(VPSLinear.from_linear(linear))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda m, _: isinstance(m, nn.Linear))
    assert type(model[0]) is VPSLinear and model[0].matrix() is None
    plain = copy.deepcopy(linear)
    torchao.quantize_(plain, torchao.Int8WeightOnlyConfig())
    W, b = dense(plain)
    expected = reference.vps_linear(x.double(), W, b, config=VPSConfig()).y
    torch.testing.assert_close(model(x).double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_transformers_and_peft_load_them(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    llama().save_pretrained(tmp_path)
    for options in ({"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
        )
        report = vps.patch(model, VPSConfig(builder="sk"))
        assert len(report.forms) == 14 and all(
            f.startswith("opaque (L") for f in report.forms.values()
        )
        sharpened = model(IDS).logits
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).eval()
        layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
        assert type(layer).__module__ == "peft.tuners.lora.bnb"
        assert sharpened_by(layer).module is layer
        logits = adapted(IDS).logits
        assert (logits - sharpened).norm() <= 0.1 * sharpened.norm()  # B is 0 at the start
