"""Layers sharpened through their own forward: what they read of it, and its gradients."""

import pytest
import torch
import torch.nn.functional as F
from cases import HEADS, coupled_case, random_case, reference_of, relative_error
from opaque_cases import Block, Hidden, Quantized, applied, opaque
from torch import nn

import vps
from vps import VPSConfig, vps_linear


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
        y = applied(model, case | {"x": x})
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
        assert relative_error(applied(model, case), reference_of(case).y) <= 1e-10, seed
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
def test_no_sequence():
    model = opaque(torch.randn(40, 33), None, VPSConfig(scope="token"))
    assert model(torch.randn(0, 5, 33)).shape == (0, 5, 40)


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
        expected = vps.reference.vps_linear(x, W, config=config).y
        assert relative_error(model(x), expected) <= 1e-10, config


@torch.no_grad()
def test_fullgraph_compiles():
    torch._dynamo.reset()
    torch.manual_seed(0)
    W, b, x = torch.randn(40, 33), torch.randn(40), torch.randn(3, 5, 33)
    packed = nn.Sequential(Quantized(33, 40))
    vps.patch(packed, VPSConfig(target_modules=["0"]))
    for model in (
        packed,
        opaque(W, b, VPSConfig(tau=None)),
        opaque(W, b, VPSConfig(tau=None, builder="sc", scope="token")),
    ):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    # Rows of W take a backward pass, which breaks the graph.
    model = opaque(W, b, VPSConfig())
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"autograd\.grad|requires_grad_"):  # later or torch 2.11
        torch.compile(model, fullgraph=True, backend="aot_eager")(x)


def test_a_gradient_of_a_gradient_by_the_weight_of_the_layer():
    """In the update W is a constant, in the base product it is not (SPEC §6)."""
    found = []
    for known in (True, False):
        torch.manual_seed(0)
        W, b, x = torch.randn(6, 8).double(), torch.randn(6).double(), torch.randn(2, 4, 8).double()
        if known:
            layer, weight = vps.VPSLinear(8, 6, dtype=torch.float64), None
            layer.weight.data, layer.bias.data = W, b
            weight = layer.weight
        else:
            layer = opaque(W, b, VPSConfig())
            weight = next(p for p in layer.parameters() if p.dim() == 2)
            weight.requires_grad_(True)
        x.requires_grad_()
        (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        (twice,) = torch.autograd.grad(g.square().sum(), weight)
        found.append(twice if twice.shape == W.shape else twice.T)
    torch.testing.assert_close(*found)
