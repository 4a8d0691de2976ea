"""Layers sharpened through their own forward, against the reference on their dense weight."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import HEADS, coupled_case, coupled_reference_of, random_case, reference_of
from torch import nn

import vps
from vps import VPSConfig, token_mask, vps_linear
from vps.lbfgs import CurvatureMemory
from vps.opaque_layer import sharpened_by
from vps.weight_rows import RowNorms


class Hidden(nn.Linear):
    """A linear layer that shows its map in its forward alone, as other libraries' do."""

    def __init__(self, W, b=None):
        super().__init__(W.shape[1], W.shape[0], b is not None, dtype=W.dtype)
        self.hidden = nn.Parameter(W.clone(), requires_grad=False)
        self.weight = None
        self.calls = []
        if b is not None:
            self.bias = nn.Parameter(b.clone(), requires_grad=False)

    @property
    def weight(self):
        return nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)

    @weight.setter
    def weight(self, value):
        pass

    def register_parameter(self, name, parameter):
        if name != "weight":
            super().register_parameter(name, parameter)

    def reset_parameters(self):
        pass

    def forward(self, x):
        self.calls.append(len(x) if x.dim() > 1 else 1)
        return F.linear(x, self.hidden, self.bias)


def opaque(W, b, config, *, state=None, gradient=False, memory=None):
    """A sharpened layer of that W, as a patched model holds it."""
    model = nn.Sequential(Hidden(W, b))
    report = vps.patch(model, config.replace(target_modules=["0"]))
    assert report.forms == {"0": "opaque (Hidden)"}
    layer = sharpened_by(model[0])
    assert layer.matrix() is None
    layer.gradient, layer.memory = gradient, memory
    if state is not None:
        layer.state = state
    model[0].calls.clear()
    return model


def apply(model, x, mask):
    if mask is None:
        return model(x)
    with token_mask(mask):
        return model(x)


def check(y, expected, seed, bound=1e-10):
    finite = expected.isfinite()
    assert torch.equal(finite, y.isfinite()), seed
    error = (y - expected)[finite].norm() / expected[finite].norm().clamp(min=1e-300)
    assert error <= bound, (seed, error)


@pytest.mark.parametrize("block", range(4))
@torch.no_grad()
def test_float64_equals_the_reference(block):
    for seed in range(block * 100, block * 100 + 100):
        case = random_case(seed)
        model = opaque(
            case["W"], case["b"], case["config"], state=case["state"], gradient=case["gradient"]
        )
        check(apply(model, case["x"], case["mask"]), reference_of(case).y, seed)


@pytest.mark.parametrize("kinds", ["both", "query", "key"])
@pytest.mark.parametrize("first", ["q_proj", "k_proj"])
@torch.no_grad()
def test_coupled_layers_equal_the_reference(kinds, first):
    """One of the two, or both, known by the forward alone, whichever is called first."""
    for seed in range(60):
        case = coupled_case(seed)
        hidden = {"both": (True, True), "query": (True, False), "key": (False, True)}[kinds]
        block = Block(case, hidden, first)
        report = vps.patch(block, case["config"].replace(target_modules=["q_proj", "k_proj"]))
        assert report.coupled == ("",)
        for index, name in enumerate(("q_proj", "k_proj")):
            layer = sharpened_by(getattr(block, name))
            layer.state, layer.gradient = case["state"], (case["gradient"], True)[index]
            layer.memory = memory(case["weights"][index], case["memories"][index])
        ys = apply(block, case["x"], case["mask"])
        for y, expected in zip(ys, coupled_reference_of(case), strict=True):
            check(y, expected.y, seed)


class Block(nn.Module):
    """An attention block that calls its query and key layer."""

    def __init__(self, case, hidden, first):
        super().__init__()
        for name, W, b, is_hidden in zip(
            ("q_proj", "k_proj"), case["weights"], case["bias"], hidden, strict=True
        ):
            if is_hidden:
                layer = Hidden(W, b)
            else:
                layer = nn.Linear(W.shape[1], W.shape[0], b is not None, dtype=W.dtype)
                with torch.no_grad():
                    layer.weight.copy_(W)
                    if b is not None:
                        layer.bias.copy_(b)
            setattr(self, name, layer)
        self.head_dim = case["weights"][0].shape[0] // case["heads"][0]
        self.first = first

    def forward(self, x):
        if self.first == "q_proj":
            return self.q_proj(x), self.k_proj(x)
        key = self.k_proj(x)
        return self.q_proj(x), key


def memory(W, pairs):
    held = CurvatureMemory()
    w = g = torch.zeros_like(W[:, 0])
    held.record(w, g)
    for s, y in pairs:
        w, g = w + s, g + y
        held.record(w, g)
    assert len(held.pairs) == len(pairs)
    return held


@torch.no_grad()
def test_both_of_a_pair_run_once():
    case = coupled_case(HEADS.index((4, 2, 5)))
    block = Block(case, (True, True), "q_proj")
    vps.patch(block, VPSConfig(target_modules=["q_proj", "k_proj"], tau=None, builder="sk"))
    block.q_proj.calls.clear()
    block.k_proj.calls.clear()
    block(torch.randn(1, 3, case["x"].shape[-1], dtype=torch.float64))
    assert len(block.q_proj.calls) == len(block.k_proj.calls) == 1


@pytest.mark.parametrize("trains", [False, True])
def test_gradients_are_those_of_a_layer_with_a_weight(trains):
    """SPEC §6: what the update adds reaches x, but neither W nor b."""
    for seed in range(40):
        case = random_case(seed)
        x = case["x"].nan_to_num(0.0, 0.0, 0.0).clamp(-1e3, 1e3)
        tensors = [x, case["W"]] + ([] if case["b"] is None else [case["b"]])
        x, W, *rest = (t.clone().requires_grad_(i == 0 or trains) for i, t in enumerate(tensors))
        b = rest[0] if rest else None
        options = dict(state=case["state"], gradient=case["gradient"])
        expected = vps_linear(x, W, b, case["config"], mask=case["mask"], **options)
        g = torch.randn(expected.shape, dtype=torch.float64)
        wanted = torch.autograd.grad(
            expected, [t for t in (x, W, b) if t is not None and t.requires_grad], g
        )
        model = opaque(W.detach(), None if b is None else b.detach(), case["config"], **options)
        if trains:
            model.requires_grad_()
        y = apply(model, x, case["mask"])
        layer = model[0]
        inputs = [x, layer.hidden, layer.bias] if trains else [x]
        for got, right in zip(
            torch.autograd.grad(y, [t for t in inputs if t is not None], g), wanted, strict=True
        ):
            torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_off_is_the_layer_itself_bit_for_bit():
    torch.manual_seed(0)
    W, b, x = torch.randn(40, 33), torch.randn(40), torch.randn(3, 5, 33)
    base = F.linear(x, W, b)
    model = opaque(W, b, VPSConfig())
    assert not torch.equal(model(x), base)
    with vps.disabled(model):
        assert torch.equal(model(x), base)
    vps.set_config(model, VPSConfig(target_modules=["0"], gamma=0, adaptive_gamma=False))
    assert torch.equal(model(x), base)
    vps.unpatch(model)
    assert torch.equal(model(x), base)
    assert type(model[0]) is Hidden and not {"forward", "_sharpened"} & set(vars(model[0]))


@torch.no_grad()
def test_weight_is_read_once_a_call():
    """r one-hot rows ride along, and those of all sequences once each."""
    torch.manual_seed(0)
    W, b = torch.randn(40, 33), torch.randn(40)
    model = opaque(W, b, VPSConfig(adaptive_rank=False, rank=3, tau=None, builder="sk"))
    model(torch.randn(5, 33))
    assert model[0].calls == [5 + 3]
    model[0].calls.clear()
    x = torch.randn(1, 5, 33).expand(4, 5, 33)
    model(x)
    assert model[0].calls == [20 + 3]
    model[0].calls.clear()
    vps.set_config(model, VPSConfig(target_modules=["0"], scope="token"))
    many = torch.randn(400, 33)
    expected = vps.reference.vps_linear(many, W, b, config=VPSConfig(scope="token")).y
    torch.testing.assert_close(model(many), expected, rtol=1e-4, atol=1e-4)
    assert model[0].calls[0] == 400 + 33  # no feature twice


@torch.no_grad()
def test_many_features_go_in_calls_of_their_own(monkeypatch):
    for module in ("riding", "weight_rows"):
        monkeypatch.setattr(f"vps.{module}.RIDERS", 4)
    for seed in range(40):
        case = random_case(seed)
        model = opaque(
            case["W"], case["b"], case["config"], state=case["state"], gradient=case["gradient"]
        )
        check(apply(model, case["x"], case["mask"]), reference_of(case).y, seed)
        assert max(model[0].calls[1:], default=0) <= 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_large_bias_costs_no_digits(dtype):
    """Qwen2's key biases are a hundred times the product; H and B must not lose to them."""
    torch.manual_seed(0)
    W, b = torch.randn(24, 33).to(dtype) / 6, 200 * torch.randn(24).to(dtype)
    x = torch.randn(2, 5, 33).to(dtype)
    model = opaque(W, b, VPSConfig(builder="sk"))
    with vps.backend("torch"):
        expected = vps_linear(x, W, b, VPSConfig(builder="sk"))
    assert (model(x).float() - expected.float()).abs().max() <= torch.finfo(dtype).eps * 400


@torch.no_grad()
def test_batch_mates_do_not_matter():
    torch.manual_seed(0)
    W, x = torch.randn(40, 33, dtype=torch.float64), torch.randn(3, 5, 33, dtype=torch.float64)
    for scope in ("sequence", "token"):
        model = opaque(W, None, VPSConfig(scope=scope))
        for row in range(3):
            torch.testing.assert_close(model(x)[row : row + 1], model(x[row : row + 1]))
    empty = model(x[:0])
    assert empty.shape == (0, 5, 40)


@torch.no_grad()
def test_dropout_of_an_adapter_touches_neither_B_nor_the_norms():
    class Dropped(Hidden):
        def __init__(self, W):
            super().__init__(W)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            return F.linear(self.dropout(x), self.hidden)

    torch.manual_seed(0)
    W = torch.randn(40, 33, dtype=torch.float64)
    model = nn.Sequential(Dropped(W))
    vps.patch(model, VPSConfig(target_modules=["0"]))
    model.eval()
    x = torch.randn(4, 33, dtype=torch.float64)
    expected = model(x)
    model.train()
    seen = torch.stack([model(x) for _ in range(20)])
    assert not torch.allclose(seen[0], seen[1])
    model[0].dropout.p = 0.0
    torch.testing.assert_close(model(x), expected)
    assert model[0].dropout.training


@torch.no_grad()
def test_copies_pickles_and_saved_settings(tmp_path):
    torch.manual_seed(0)
    W, b, x = torch.randn(40, 33), torch.randn(40), torch.randn(3, 5, 33)
    model = opaque(W, b, VPSConfig())
    expected = model(x)
    keys = list(model.state_dict())
    assert keys == list(nn.Sequential(Hidden(W, b)).state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
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
    layer = nn.Linear(6, 5)
    model = nn.Sequential(layer)

    class Quantized(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.view(5, 6).float(), self.bias)

    layer.__class__ = Quantized
    layer.weight = nn.Parameter(torch.randint(-9, 9, (30,), dtype=torch.int8), requires_grad=False)
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


@pytest.mark.parametrize("part", ["none", "half"])
@torch.no_grad()
def test_rows_of_a_layer_without_backward_come_from_the_identity(part):
    """Also where the backward pass is there but leaves out a part, as of an adapter around it."""
    torch.manual_seed(0)
    W, x = torch.randn(7, 9, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)

    class WithoutBackward(Hidden):
        def forward(self, x):
            y = F.linear(x.detach(), self.hidden)
            return y if part == "none" else 0.5 * y + 0.5 * F.linear(x, self.hidden)

    for config in (VPSConfig(tau=None), VPSConfig(), VPSConfig(builder="sc", clip="spectral")):
        model = nn.Sequential(WithoutBackward(W))
        if config.tau is None:
            vps.patch(model, config.replace(target_modules=["0"]))
        else:
            with pytest.warns(UserWarning, match="no backward pass .* 9 one-hot rows"):
                vps.patch(model, config.replace(target_modules=["0"]))
        check(model(x), vps.reference.vps_linear(x, W, config=config).y, config)


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
def test_fullgraph_compiles():
    torch._dynamo.reset()
    torch.manual_seed(0)
    W, b, x = torch.randn(40, 33), torch.randn(40), torch.randn(3, 5, 33)
    for config in (VPSConfig(tau=None), VPSConfig(tau=None, builder="sc", scope="token")):
        model = opaque(W, b, config)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
