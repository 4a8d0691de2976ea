"""The file of a calibration, what it is refused for, and how a model takes it."""

import json

import pytest
import torch
import torch.nn.functional as F
from calibration_cases import made
from tiny import tiny_llama

import vps
from vps import Calibration, VPSConfig, clear_calibration
from vps.evaluation.controls import control
from vps.model.calibration import fingerprint
from vps.model.patching import sharpened_layers
from vps.model.statistics import measure


@pytest.fixture
def model():
    return tiny_llama()


@pytest.mark.parametrize("gamma", [-0.25, (0.1, -0.2, 0.0, 1e-17)])
def test_file(model, tmp_path, gamma):
    calibration = made(model, gamma)
    calibration.save(tmp_path / "c.json")
    again = Calibration.load(tmp_path / "c.json")
    assert again == calibration and again.per == ("layer" if gamma == -0.25 else "column")
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
    text = (tmp_path / "c.json").read_text()
    for change, message in (
        ({"extra": 1}, "unknown key 'extra'"),
        ({"format": "vps-settings-1"}, "expected an object of format"),
        ({"gamma": {}}, "gamma"),
        ({"gamma": {"a": "0.5"}}, "gamma"),
        ({"gamma": {"a": [0.5, None]}}, "gamma"),
        ({"gamma": {"a": True}}, "gamma"),
        ({"gamma": {"a": []}}, "empty"),
        ({"found": "yes"}, "found"),
        ({"scope": "all"}, "scope"),
        ({"config": {"gama": 1}}, "gama"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(json.loads(text) | change))
        with pytest.raises((TypeError, ValueError), match=message) as error:
            Calibration.load(tmp_path / "bad.json")
        assert "bad.json" in str(error.value)
    values = json.loads(text)
    del values["weights"]
    with pytest.raises(ValueError, match="missing key 'weights'"):
        Calibration.from_json(json.dumps(values))
    with pytest.raises(ValueError, match="not valid JSON"):
        Calibration.from_json(text[:-20])
    with pytest.raises(ValueError, match="finite"):
        made(model, float("nan"))


def test_a_failed_write_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "c.json"
    made(model).save(path)
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        made(model, 0.5).save(path)
    assert path.read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_every_layer_takes_its_gamma(model):
    calibration = made(model)
    names = list(calibration.gamma)
    gamma = {name: -0.1 * (number + 1) for number, name in enumerate(names)}
    made(model, gamma=gamma).apply(model)
    inputs = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    entries = measure(model, inputs)
    assert {e.name: e.gamma for e in entries} == pytest.approx(gamma)
    assert all(e.relative_size > 0 for e in entries)
    layer = sharpened_layers(model)["model.layers.0.mlp.down_proj"]
    x = torch.randn(1, 2, 24)
    own = layer.config.replace(
        gamma=abs(gamma["model.layers.0.mlp.down_proj"]), adaptive_gamma=False
    )
    positive = vps.vps_linear(x, layer.weight, None, own) - F.linear(x, layer.weight)
    torch.testing.assert_close(layer(x) - F.linear(x, layer.weight), -positive)
    with vps.disabled(model):
        assert torch.equal(layer(x), F.linear(x, layer.weight))
    clear_calibration(model)
    assert torch.equal(layer(x), vps.vps_linear(x, layer.weight, None, layer.config))


def test_it_is_refused_with_what_differs(model):
    calibration = made(model)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    with pytest.raises(ValueError, match="refused: weights are of version .* other values"):
        calibration.apply(model)
    model = tiny_llama()
    vps.patch(model, VPSConfig(rank=3, tau=None))
    with pytest.raises(ValueError, match=r"config field rank is 3, expected 2; .*tau is None"):
        calibration.apply(model)
    vps.patch(model, calibration.config.replace(target_modules=("up_proj",)))
    with pytest.raises(ValueError, match="no such layers: .*down_proj"):
        calibration.apply(model)
    assert all(layer.gamma is None for layer in sharpened_layers(model).values())
    vps.unpatch(model)
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM, expected a GPT2"):
        made(tiny_llama(), architecture="GPT2").apply(model)
    assert not sharpened_layers(model)
    with pytest.raises(ValueError, match="weights are of version"):
        calibration.apply(tiny_llama().double())
    with pytest.raises(ValueError, match="γ of .* holds 3 numbers, expected 4"):
        made(tiny_llama(), (0.1, 0.2, 0.3)).apply(tiny_llama())


def test_it_sharpens_a_plain_model(model, tmp_path):
    calibration = made(model, (0.3, -0.2, 0.1, 0.4))
    calibration.save(tmp_path / "c.json")
    ids = torch.tensor([[3, 4, 5, 6]])
    calibration.apply(model)
    with torch.no_grad():
        expected = model(ids).logits
        vps.save(model, tmp_path / "s.json")
        for path in ("c.json", "s.json"):  # vps.load takes either
            other = tiny_llama()
            vps.unpatch(other)
            report = vps.load(other, tmp_path / path)
            assert len(report.patched) == 7
            assert torch.equal(other(ids).logits, expected)
            other = tiny_llama()
            vps.unpatch(other)
            other.lm_head.weight.mul_(2)
            with pytest.raises(ValueError, match="weights"):
                vps.load(other, tmp_path / path)
            assert not sharpened_layers(other)
    vps.unpatch(model)
    vps.patch(model, calibration.config)
    assert all(layer.gamma is None for layer in sharpened_layers(model).values())


def test_it_belongs_to_its_config(model):
    made(model).apply(model)
    config = next(iter(sharpened_layers(model).values())).config
    vps.set_config(model, config.replace(scope="token"))
    with pytest.raises(ValueError, match="clear_calibration"):
        vps.set_config(model, config.replace(rank=1))
    clear_calibration(model)
    vps.set_config(model, config.replace(rank=1))


def test_controls_keep_gamma(model):
    """Features are taken away, γ and its sign are not."""
    names = list(sharpened_layers(model))
    gamma = {name: -0.4 if "mlp" in name else 0.0 for name in names}
    made(model, gamma=gamma).apply(model)
    layer = sharpened_layers(model)["model.layers.0.mlp.up_proj"]
    plain = sharpened_layers(model)["model.layers.0.self_attn.v_proj"]
    x = torch.randn(1, 3, 16)
    with torch.no_grad():
        for name in ("random_indices", "random_noise", "shuffled_selection"):
            with control(model, name, 1):
                assert torch.equal(plain(x), F.linear(x, plain.weight)), name
                assert not torch.equal(layer(x), F.linear(x, layer.weight)), name
        with control(model, "random_indices", 1):
            config = layer.config
            own = vps.vps_linear(x, layer.weight, None, config, gamma=-0.4)
            assert config.builder == "random" and torch.equal(layer(x), own)


def test_fingerprint_sees_every_bit(model):
    first = fingerprint(model)
    assert first == fingerprint(tiny_llama())
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        before = float(weight[3, 5])
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
        assert fingerprint(model) != first
        weight[3, 5] = before
    assert fingerprint(model) == first
    vps.unpatch(model)
    assert fingerprint(model) == first
    assert fingerprint(model.half()) != first
