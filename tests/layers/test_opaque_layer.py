"""What stands in a module's place: copies, norms, refusals, and a layer's own γ."""

import pytest
import torch
import torch.nn.functional as F
from cases import HEADS, copies, coupled_case
from opaque_cases import Block, Hidden, Quantized, opaque
from torch import nn

import vps
from vps import VPSConfig, vps_linear
from vps.algorithm.policy import LayerGamma
from vps.layers.opaque_layer import sharpened_by
from vps.layers.weight_rows import RowNorms


@torch.no_grad()
def test_copies_pickles_and_saved_settings(tmp_path):
    torch.manual_seed(0)
    W, b, x = torch.randn(40, 33), torch.randn(40), torch.randn(3, 5, 33)
    model = opaque(W, b, VPSConfig())
    expected = model(x)
    keys = list(model.state_dict())
    assert keys == list(nn.Sequential(Hidden(W, b)).state_dict())
    for twin in copies(model):
        assert torch.equal(twin(x), expected)
        layer = sharpened_by(twin[0])
        assert layer.module is twin[0] and layer.state is not vps.policy_state(model)
        with torch.no_grad():
            twin[0].hidden.mul_(0)
        assert not torch.equal(twin(x), expected) and torch.equal(model(x), expected)
    vps.save(model, tmp_path / "settings.json")
    fresh = nn.Sequential(Hidden(W, b))
    vps.load(fresh, tmp_path / "settings.json")
    assert torch.equal(fresh(x), expected)


@torch.no_grad()
def test_changed_weights_count_at_once():
    """Also by ``.data``, which no version tells of."""
    torch.manual_seed(0)
    W, x = torch.randn(40, 33, dtype=torch.float64), torch.randn(5, 33, dtype=torch.float64)
    model = opaque(W, None, VPSConfig())
    model(x)
    model[0].hidden.data.mul_(torch.randn(40, 1, dtype=torch.float64))
    expected = vps.reference.vps_linear(x, model[0].hidden, config=VPSConfig()).y
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_kept_norms_are_found_again_for_other_parameters():
    layer = Quantized(6, 5)
    model = nn.Sequential(layer)
    report = vps.patch(model, VPSConfig(target_modules=["0"], builder="sk"))
    assert report.forms == {"0": "opaque (Quantized)"}
    handle = sharpened_by(layer)
    assert isinstance(handle.norms, RowNorms)
    x = torch.randn(3, 6)
    for _ in range(3):
        W = layer.weight.view(5, 6).float()
        expected = vps.reference.vps_linear(x, W, layer.bias, config=VPSConfig(builder="sk")).y
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(handle.norms._norms, W.norm(dim=1))
        layer.weight = nn.Parameter(
            torch.randint(-9, 9, (30,), dtype=torch.int8), requires_grad=False
        )


def test_what_cannot_be_is_refused_with_the_reason():
    W, x = torch.randn(7, 9), torch.randn(3, 9)
    model = opaque(W, None, VPSConfig())
    with vps.backend("reference"), pytest.raises(RuntimeError, match="'torch' alone"):
        model(x)
    with pytest.raises(TypeError, match="adapter_names"):
        model[0](x, adapter_names=["a"] * 3)
    with pytest.raises(ValueError, match=r"x must be \[..., 9\]"):
        model(torch.randn(3, 8))
    with pytest.raises(TypeError, match="floating point.*int64"):
        model(torch.ones(2, 9, dtype=torch.int64))


@torch.no_grad()
def test_parametrized_layers_and_subclasses_are_read_by_their_weight():
    torch.manual_seed(0)

    class Named(nn.Linear):
        pass

    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(9, 8)), Named(8, 7))
    report = vps.patch(model, VPSConfig(target_modules=["0", "1"]))
    assert report.forms == {"0": "opaque (ParametrizedLinear)", "1": "opaque (Named)"}
    assert "2 layers sharpened\nforms: 1 opaque (ParametrizedLinear), 1 opaque (Named)" in str(
        report
    )
    x = torch.randn(4, 9)
    for _ in range(2):
        h = vps_linear(x, model[0].weight, model[0].bias, VPSConfig())
        assert torch.equal(model(x), vps_linear(h, model[1].weight, model[1].bias, VPSConfig()))
        model[0].parametrizations.weight.original0.mul_(2)


@torch.no_grad()
def test_gamma_zero_of_its_own_is_the_layer_itself():
    torch.manual_seed(0)
    W, b, x = torch.randn(40, 33), torch.randn(40), torch.randn(3, 5, 33)
    model = opaque(W, b, VPSConfig(builder="sc"))
    sharpened_by(model[0]).gamma = LayerGamma(0.0)
    assert torch.equal(model(x), F.linear(x, W, b))


@torch.no_grad()
def test_own_gamma_of_one_of_a_pair():
    case = coupled_case(HEADS.index((4, 2, 5)))
    x = torch.randn(1, 3, case["x"].shape[-1], dtype=torch.float64)
    config = VPSConfig(target_modules=["q_proj", "k_proj"])
    outputs = []
    for hidden in ((True, True), (False, False)):
        block = Block(case, hidden, "q_proj")
        vps.patch(block, config)
        sharpened_by(block.q_proj).gamma = LayerGamma(0.0)
        sharpened_by(block.k_proj).gamma = LayerGamma(-0.4)
        outputs.append(block(x))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)
    base = F.linear(x, case["weights"][0], case["bias"][0])
    assert torch.equal(outputs[0][0], base)


@torch.no_grad()
def test_a_shared_layer_stays_shared():
    shared = Hidden(torch.randn(4, 4))
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = vps.patch(model, VPSConfig(target_modules=["a"]))
    assert report.patched == ("a",) and len(vps.model.patching.sharpened_layers(model)) == 1
    x = torch.randn(3, 4)
    assert model["a"] is model["b"][0] and torch.equal(model["a"](x), model["b"](x))
    assert not torch.equal(model["a"](x), F.linear(x, shared.hidden))


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_weights_that_a_hook_computes():
    """torch.nn.utils.weight_norm of old: known when the layer itself is called, hence uncoupled."""
    case = coupled_case(HEADS.index((4, 2, 5)))
    x = torch.randn(1, 3, case["x"].shape[-1], dtype=torch.float64)
    block = Block(case, (False, False), "q_proj")
    nn.utils.weight_norm(block.k_proj)
    report = vps.patch(block, VPSConfig(target_modules=["q_proj", "k_proj"]))
    assert report.forms["k_proj"] == "opaque (Linear with a computed weight)"
    assert "a hook computes the weight" in report.not_patched[""]
    block.k_proj.weight_g.mul_(3)
    key = block(x)[1]
    expected = vps_linear(x, 3 * case["weights"][1], case["bias"][1])
    torch.testing.assert_close(key, expected)
