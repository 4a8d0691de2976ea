"""``vps.save`` and ``vps.load``: layers of every form, several configs, and nothing half-done."""

import copy
import json

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune

import vps
from vps import VPSConfig
from vps.algorithm.policy import LayerGamma
from vps.model.patching import sharpened_layers

EVERY = VPSConfig(target_modules="all-linear")


def plain_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def weight_norm():
    model = plain_layers()
    parametrizations.weight_norm(model[0])
    return model


def pruned():
    model = plain_layers()
    prune.l1_unstructured(model[0], "weight", 0.3)
    return model


def adapted():
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    model = plain_layers()
    torch.manual_seed(1)
    return get_peft_model(model, config).eval()


def quantized(make):
    torch.manual_seed(0)
    model = plain_layers()
    weight = model[0].state_dict()
    model[0] = make(64, 64)
    model[0].load_state_dict(weight)
    return model.to("cpu")


def nf4():
    return quantized(
        lambda *d: bitsandbytes.nn.Linear4bit(*d, quant_type="nf4", compute_dtype=torch.float32)
    )


MODELS = [plain_layers, weight_norm, pruned, adapted, nf4]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@torch.no_grad()
def test_gamma_of_layers_of_every_form(make, tmp_path):
    model, x = make(), torch.randn(3, 5, 64)
    plain = model(x)
    vps.patch(model, EVERY)
    layers = list(sharpened_layers(model).values())
    layers[0].gamma = LayerGamma(-0.7)
    layers[1].gamma = LayerGamma([0.1, 0.2, 0.3, 0.4])
    expected = model(x)
    vps.save(model, tmp_path / "vps.json")
    fresh = make()
    assert torch.equal(fresh(x), plain)
    vps.load(fresh, tmp_path / "vps.json")
    assert torch.equal(fresh(x), expected) and not torch.equal(expected, plain)
    other = make()
    next(p for p in other.parameters() if p.is_floating_point()).add_(1)
    with pytest.raises(ValueError, match="other weights"):
        vps.load(other, tmp_path / "vps.json")
    assert not sharpened_layers(other)


@torch.no_grad()
def test_every_layer_keeps_its_config(tmp_path):
    model, x = plain_layers(), torch.randn(3, 5, 64)
    vps.patch(model, EVERY)
    first, last = sharpened_layers(model).values()
    last.config = EVERY.replace(gamma=0.1, scope="token")
    vps.save(model, tmp_path / "vps.json")
    expected = model(x)
    fresh = plain_layers()
    assert len(vps.load(fresh, tmp_path / "vps.json").patched) == 2
    assert torch.equal(fresh(x), expected)
    assert [layer.config for layer in sharpened_layers(fresh).values()] == [
        first.config, last.config,
    ]  # fmt: skip
    # parts patched for layers that each names in its own way
    part, whole = nn.Sequential(nn.Linear(64, 64)), plain_layers()
    model = nn.ModuleDict({"a": part, "b": whole, "c": copy.deepcopy(whole)})
    vps.patch(model, EVERY.replace(exclude_modules=["c.0", "c.2"]))
    vps.patch(model["b"], VPSConfig(target_modules=["2"], builder="sk"))
    vps.save(model, tmp_path / "vps.json")
    names = list(sharpened_layers(model))
    assert names == ["a.0", "b.2"]
    vps.unpatch(model)
    vps.load(model, tmp_path / "vps.json")
    assert list(sharpened_layers(model)) == names and model["b"][2].config.builder == "sk"
    with pytest.raises(ValueError, match="c.0|lacks|none of"):
        vps.load(nn.ModuleDict({"a": part}), tmp_path / "vps.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("entropy", "much"), ("entropy", -1), ("outcomes", [1]), ("outcomes", None),
        ("gamma", {"0": "x"}), ("gamma", {"9": 1.0}), ("gamma", [1]), ("configs", [1]),
        ("configs", {"0": {}, "9": {}}), ("configs", {"0": {"gama": 1}}),
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_broken_file_leaves_the_model_plain(tmp_path, key, value):
    model = plain_layers()
    vps.patch(model, EVERY)
    next(iter(sharpened_layers(model).values())).gamma = LayerGamma(0.5)
    vps.save(model, tmp_path / "vps.json")
    vps.unpatch(model)
    values = json.loads((tmp_path / "vps.json").read_text()) | {key: value}
    (tmp_path / "vps.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="vps.load|from_json"):
        vps.load(model, tmp_path / "vps.json")
    assert not sharpened_layers(model)
    assert all(type(layer) is nn.Linear for layer in (model[0], model[2]))


def test_what_is_no_file_is_not_replaced(tmp_path):
    model = plain_layers()
    vps.patch(model, EVERY)
    for path in (tmp_path, "/dev/null"):
        with pytest.raises(OSError, match="not a regular file"):
            vps.save(model, path)
    vps.save(model, str(tmp_path / "vps.json"))
    assert [each.name for each in tmp_path.iterdir()] == ["vps.json"]


@torch.no_grad()
def test_gamma_of_torchao_layers(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    made = []
    for _ in range(2):
        model = plain_layers()
        torchao.quantize_(model[0], torchao.Int8WeightOnlyConfig())
        made.append(model)
    model, fresh = made
    vps.patch(model, EVERY)
    next(iter(sharpened_layers(model).values())).gamma = LayerGamma(0.3)
    vps.save(model, tmp_path / "vps.json")
    vps.load(fresh, tmp_path / "vps.json")
    x = torch.randn(3, 5, 64)
    assert torch.equal(fresh(x), model(x))
    other = plain_layers()
    other[0].weight.mul_(2)
    torchao.quantize_(other[0], torchao.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="other weights"):
        vps.load(other, tmp_path / "vps.json")
