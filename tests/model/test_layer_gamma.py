"""γ of a layer of its own, of either sign, one a column: every backend against the reference."""

import random

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from cases import (
    coupled_case,
    coupled_in_float32,
    in_float32,
    random_case,
    tiny_llama,
)

import vps
from vps import VPSConfig, reference, vps_linear
from vps.algorithm.lbfgs import CurvatureMemory
from vps.algorithm.policy import LayerGamma
from vps.functional import Projection, coupled_vps_linear, plan_for
from vps.model.patching import sharpened_layers

CASES = {"torch": 300, "cpp": 300, "triton": 30}


@pytest.fixture(params=CASES)
def backend(request):
    reason = vps.backends()[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with vps.backend(request.param):
        yield request.param


def columns_of(config, gradient, W):
    plan = plan_for(config, gradient, 1.0, *W.shape, W.device, True)
    return plan.settings.r


def drawn(seed, r):
    """A number of either sign, or one a column, 0 among them."""
    rng = random.Random(seed)
    if seed % 3 == 0:
        return rng.uniform(-1.5, 1.5)
    return [rng.choice([0.0, rng.uniform(-1.5, 1.5)]) for _ in range(r - 1)] + [-0.7]


def relative_error(y, expected):
    finite = expected.isfinite()
    assert torch.equal(finite, y.isfinite())
    size = expected[finite].norm().clamp(min=1e-300)
    return float((y.double() - expected)[finite].norm() / size)


def reference_of(case, gamma):
    return reference.vps_linear(
        case["x"], case["W"], case["b"], config=case["config"], mask=case["mask"],
        entropy=case["entropy"], outcomes=case["outcomes"], gradient=case["gradient"], gamma=gamma,
    )  # fmt: skip


def test_float32_grid(backend):
    for seed in range(CASES[backend]):
        case, wide = in_float32(random_case(seed))
        gamma = drawn(seed, columns_of(case["config"], case["gradient"], case["W"]))
        y = vps_linear(
            case["x"], case["W"], case["b"], case["config"],
            mask=case["mask"], state=case["state"], gradient=case["gradient"], gamma=gamma,
        )  # fmt: skip
        assert relative_error(y, reference_of(wide, gamma).y) <= 1e-6, seed


def test_float64_grid_of_torch():
    with vps.backend("torch"):
        for seed in range(300):
            case = random_case(seed)
            gamma = drawn(seed, columns_of(case["config"], case["gradient"], case["W"]))
            y = vps_linear(
                case["x"], case["W"], case["b"], case["config"],
                mask=case["mask"], state=case["state"], gradient=case["gradient"], gamma=gamma,
            )  # fmt: skip
            assert relative_error(y, reference_of(case, gamma).y) <= 1e-10, seed


def test_coupled_grid(backend):
    for seed in range(CASES[backend] // 2):
        case, wide = coupled_in_float32(coupled_case(seed))
        heads, kv_heads = case["heads"]
        r = columns_of(case["config"], False, case["weights"][1])
        gammas = [drawn(seed, r), drawn(seed + 1, r)]
        if seed % 5 == 0:
            gammas[seed // 5 % 2] = 0.0
        query, key = (
            Projection(W, b, gradient, None, LayerGamma(gamma))
            for W, b, gradient, gamma in zip(
                case["weights"], case["bias"], (case["gradient"], True), gammas, strict=True
            )
        )
        ys = coupled_vps_linear(
            case["x"], query, key, heads, kv_heads, case["config"],
            mask=case["mask"], state=case["state"],
        )  # fmt: skip
        results = reference.coupled_vps_linear(
            wide["x"],
            *(
                reference.Projection(W, b, gradient, (), gamma)
                for W, b, gradient, gamma in zip(
                    wide["weights"], wide["bias"], (wide["gradient"], True), gammas, strict=True
                )
            ),
            heads=heads, kv_heads=kv_heads, config=wide["config"], mask=wide["mask"],
            entropy=wide["entropy"], outcomes=wide["outcomes"],
        )  # fmt: skip
        for y, result, p, gamma in zip(ys, results, (query, key), gammas, strict=True):
            if gamma == 0.0:
                base = F.linear(case["x"], p.weight, p.bias)
                assert torch.equal(y.nan_to_num(1e30), base.nan_to_num(1e30))
            elif 0.0 not in gammas or case["x"].isfinite().all():
                assert relative_error(y, result.y) <= 1e-6, seed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"builder": "sc"}, {"order": 2, "clip": "spectral"}, {"clamp": 0.1}]
)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7)])
@pytest.mark.parametrize("gamma", [-0.6, [0.5, -1.25, 0.0, 0.25]])
def test_narrow_dtypes_round_once(backend, dtype, settings, shape, gamma):
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-2, 3, (*shape, 33), generator=generator).double()
    W = torch.randint(-1, 2, (40, 33), generator=generator).double()
    config = VPSConfig(**settings)
    expected = reference.vps_linear(x, W, config=config, gamma=gamma).y
    y = vps_linear(x.to(dtype), W.to(dtype), None, config, gamma=gamma)
    assert relative_error(y, expected) <= 2 * torch.finfo(dtype).eps


def test_equal_columns_are_one_number_where_nothing_is_clamped(backend):
    torch.manual_seed(0)
    x, W = torch.randn(2, 5, 24), torch.randn(30, 24)
    for config in (VPSConfig(), VPSConfig(order=2, builder="sc"), VPSConfig(clip="spectral")):
        one = vps_linear(x, W, None, config, gamma=-0.4)
        columns = vps_linear(x, W, None, config, gamma=[-0.4] * 4)
        torch.testing.assert_close(columns, one, rtol=1e-5, atol=1e-5)
        fixed = config.replace(gamma=0.4, adaptive_gamma=False)
        torch.testing.assert_close(
            vps_linear(x, W, None, config, gamma=0.4), vps_linear(x, W, None, fixed), rtol=0, atol=0
        )


def test_zero_is_the_base_bit_for_bit(backend):
    torch.manual_seed(0)
    x, W, b = torch.randn(3, 1, 24), torch.randn(30, 24), torch.randn(30)
    x[0, 0, 0] = float("inf")
    for gamma in (0.0, -0.0, [0.0] * 4):
        y = vps_linear(x, W, b, gamma=gamma)
        assert torch.equal(y.nan_to_num(7), F.linear(x, W, b).nan_to_num(7))


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


def test_gradient_of_the_input(backend):
    """The backward pass is that of ``y`` with selection and core held (SPEC §6)."""
    torch.manual_seed(0)
    W = torch.randn(30, 24)
    for clamp in (None, 0.3):
        for gamma in (-0.6, [0.5, -1.0, 0.0, 0.25]):
            config = VPSConfig(clamp=clamp, adaptive_rank=False, rank=4)
            x = torch.randn(1, 6, 24, requires_grad=True)
            g = torch.randn(1, 6, 30)
            (vps_linear(x, W, None, config, gamma=gamma) * g).sum().backward()
            group = reference.vps_linear(x.detach(), W, config=config, gamma=gamma).groups[0]
            factors = [1.0] * 4 if isinstance(gamma, float) else gamma
            scale = gamma if isinstance(gamma, float) else 1.0
            held = x.detach().requires_grad_()
            delta = (held @ group.A_clipped) @ (group.B_clipped * torch.tensor(factors)).T
            delta = delta if clamp is None else delta.clamp(-clamp, clamp)
            ((held @ W.T + scale * delta) * g).sum().backward()
            torch.testing.assert_close(x.grad, held.grad, rtol=1e-4, atol=1e-4)


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
    plan = plan_for(config, False, 1.0, 30, 24, torch.device("cpu"), True)
    gamma = LayerGamma([0.1, 0.2, 0.3, 0.4])
    assert plan.numbers(gamma) is plan.numbers(gamma)
    with torch.inference_mode():
        fresh = LayerGamma(0.3)
        assert plan.numbers(fresh) is plan.numbers(fresh)
    assert not plan.numbers(fresh).is_inference()
    other = plan_for(config, False, 1.3, 30, 24, torch.device("cpu"), True)
    assert other.numbers(gamma)[0] == 1.3 and plan.numbers(gamma)[0] == 1.0


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


@pytest.mark.parametrize("settings", [{}, {"builder": "sc"}, {"order": 2}, {"clamp": 0.2}])
@pytest.mark.parametrize("gamma", [-0.6, [0.5, -1.25, 0.0, 0.25]])
def test_with_a_memory(settings, gamma):
    """L-BFGS pairs act on the columns as they are scaled (SPEC §8)."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x, W = tensor(2, 5, 24), tensor(30, 24) / 5
    memory = CurvatureMemory()
    w, g = tensor(30), tensor(30)
    for _ in range(3):
        step = tensor(30)
        w, g = w + step, g + step + 0.1 * tensor(30)
        memory.record(w, g)
    assert len(memory.pairs) == 2
    config = VPSConfig(**settings)
    pairs = [(pair.s, pair.y) for pair in memory.pairs]
    expected = reference.vps_linear(x, W, config=config, gamma=gamma, memory=pairs).y
    y = vps_linear(x, W, None, config, gamma=gamma, memory=memory)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
