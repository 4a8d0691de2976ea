"""γ of a layer of its own: its norm bound, what is kept and compiled of it, and its checks."""

import pytest
import torch
import torch._dynamo.testing
from tiny import tiny_llama

from vps import VPSConfig, reference, vps_linear
from vps.algorithm.policy import LayerGamma
from vps.functional import plan_for
from vps.model.patching import sharpened_layers


def test_norm_bound_holds_for_either_sign():
    """``|γ|·r·τ`` of the whole update, ``max|γ_c|·r·τ`` with one a column (SPEC §4)."""
    torch.manual_seed(0)
    W = torch.randn(40, 33, dtype=torch.float64)
    x = torch.randn(1, 50, 33, dtype=torch.float64)
    for gamma in (-0.9, [0.3, -0.9, 0.1, 0.9]):
        for builder in ("sk", "sc"):
            config = VPSConfig(builder=builder, adaptive_rank=False, rank=4, tau=0.8)
            group = reference.vps_linear(x, W, config=config, gamma=gamma).groups[0]
            own = gamma if isinstance(gamma, list) else [gamma] * 4
            factors = torch.tensor(own, dtype=torch.float64)
            update = (group.B_clipped * factors) @ group.A_clipped.T
            assert torch.linalg.matrix_norm(update, ord=2) <= 0.9 * 4 * 0.8 * (1 + 1e-9)
            y = vps_linear(x, W, None, config, gamma=gamma)
            torch.testing.assert_close(y - x @ W.T, x @ update.T, rtol=1e-8, atol=1e-10)


def test_values_do_not_compile_anew():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    x, W = torch.randn(1, 3, 16), torch.randn(20, 16)

    @torch.compile(backend=counter, fullgraph=True)
    def call(x, gamma):
        return vps_linear(x, W, None, gamma=gamma)

    with torch.no_grad():
        values = (0.3, -0.7, 1.1)
        expected = [vps_linear(x.clone(), W, gamma=value) for value in values]
        for value, y in zip(values, expected, strict=True):
            torch.testing.assert_close(call(x, torch.tensor(value, dtype=torch.float64)), y)
    assert counter.frame_count == 1


def test_layers_of_a_model_do_not_compile_anew():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = tiny_llama()
    layer = sharpened_layers(model)["model.layers.0.mlp.up_proj"]
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(1, 3, 16)
    with torch.no_grad():
        expected = []
        for value in (0.3, -0.7, 1.1):
            layer.gamma = LayerGamma(value)
            expected.append((layer.gamma, layer(x.clone())))
        for gamma, y in expected:
            layer.gamma = gamma
            torch.testing.assert_close(compiled(x), y)
    assert counter.frame_count == 1


def test_a_layer_keeps_what_it_passes_on():
    """One tensor for one policy, so that a call costs no more than with the config's γ."""
    config = VPSConfig()
    plan = plan_for(config, False, 30, 24, torch.device("cpu"), True)
    gamma = LayerGamma([0.1, 0.2, 0.3, 0.4])
    assert plan.numbers(gamma) is plan.numbers(gamma)
    with torch.inference_mode():
        fresh = LayerGamma(0.3)
        assert plan.numbers(fresh) is plan.numbers(fresh)
    assert not plan.numbers(fresh).is_inference()
    other = plan_for(config.replace(rank=3), False, 30, 24, torch.device("cpu"), True)
    assert other.numbers(LayerGamma(0.3))[3] == 3 and plan.numbers(gamma)[3] == 1
    address = plan.numbers(gamma).data_ptr()
    gamma.set([0.4, 0.3, 0.2, -0.1])
    assert gamma.plain() == [0.4, 0.3, 0.2, -0.1] == plan.numbers(gamma)[9:].tolist()
    assert plan.numbers(gamma).data_ptr() == address
    fresh.set(torch.tensor(-0.7))
    assert plan.numbers(fresh)[1:3].tolist() == [float(torch.tensor(-0.7))] * 2
    with pytest.raises(ValueError, match="gamma must hold 4, got 3"):
        gamma.set([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="gamma of 0 leaves its layer plain"):
        LayerGamma(0.0).set(1.0)


@pytest.mark.parametrize(
    "gamma, error",
    [
        (True, TypeError),
        ("0.5", TypeError),
        ([], TypeError),
        (float("nan"), ValueError),
        ([1.0, float("inf"), 0, 0], ValueError),
        ([0.1, 0.2], ValueError),
        (torch.ones(2, 2), TypeError),
        (torch.ones(3), ValueError),
    ],
)
def test_bad_gamma(gamma, error):
    with pytest.raises(error, match="gamma"):
        vps_linear(torch.randn(2, 24), torch.randn(30, 24), gamma=gamma)
