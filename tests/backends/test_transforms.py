"""Gradients of gradients, and layers inside ``torch.func``: all is linear in g (SPEC §6)."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import draw, tiny
from torch import nn

import vps
from vps import VPSConfig, VPSLinear
from vps.layers.linear import SharpenedLayer

CONFIGS = {
    "default": VPSConfig(),
    "clamp": VPSConfig(clamp=0.05),
    "sc, second order, token": VPSConfig(builder="sc", order=2, scope="token"),
    "spectral": VPSConfig(clip="spectral"),
    "batch": VPSConfig(scope="batch"),
    "random": VPSConfig(builder="random"),
}
BACKENDS = [
    pytest.param("torch", torch.float64, id="torch"),
    pytest.param("torch", torch.float32, id="torch-float32"),
    pytest.param("cpp", torch.float32, id="cpp"),
    pytest.param("triton", torch.float32, id="triton"),
]


def bounds(dtype):
    loose = dtype is torch.float32
    return {"rtol": 1e-4 if loose else 1e-9, "atol": 1e-4 if loose else 1e-9}


def made(kind, config, dtype):
    """A layer of d_in 6 and d_out 5, and its x."""
    torch.manual_seed(0)
    if kind == "weight":
        layer = VPSLinear(6, 5, config=config, dtype=dtype)
    else:
        layer = nn.Sequential(nn.Linear(6, 5))
        lora = LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
        layer = get_peft_model(layer, lora).to(dtype)
        vps.patch(layer, config.replace(target_modules=["0"]))
    return layer, torch.randn(2, 3, 6, dtype=dtype)


def jacobian(layer, x):
    """``∂y/∂x`` row by row, each by a backward pass of its own."""
    x = x.clone().requires_grad_()
    y = layer(x)
    rows = [
        torch.autograd.grad(y, x, row.view_as(y), retain_graph=True)[0]
        for row in torch.eye(y.numel(), dtype=y.dtype)
    ]
    return torch.stack(rows).view(*y.shape, *x.shape)


CASES = pytest.mark.parametrize(
    ("kind", "backend", "dtype"),
    [pytest.param("weight", *each.values, id=each.id) for each in BACKENDS]
    + [pytest.param("adapter", "torch", torch.float64, id="adapter")],
)
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@CASES
@EVERY_CONFIG
@pytest.mark.parametrize("frozen", [True, False])
def test_the_gradient_is_differentiable_in_g(kind, backend, dtype, config, frozen):
    layer, x = made(kind, config, dtype)
    layer.requires_grad_(not frozen)
    with vps.backend(backend):
        J = jacobian(layer, x)
        x.requires_grad_()
        y = layer(x)
        g = torch.randn_like(y).requires_grad_()
        (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
        torch.testing.assert_close(gx, torch.einsum("abc,abcdef->def", g, J), **bounds(dtype))
        v = torch.randn_like(gx)
        (twice,) = torch.autograd.grad(gx, g, v)
        torch.testing.assert_close(twice, torch.einsum("abcdef,def->abc", J, v), **bounds(dtype))
        penalty = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
        penalty.square().sum().backward()  # as a gradient penalty has it: g depends on x
        Jx = torch.einsum("abcdef,abc->def", J, 2 * layer(x))
        expected = 2 * torch.einsum("abcdef,def->abc", J, 2 * Jx)
        expected = torch.einsum("abc,abcdef->def", expected, J)
        torch.testing.assert_close(x.grad, expected, rtol=1e-3, atol=1e-3)


@CASES
@EVERY_CONFIG
def test_transforms_give_what_backward_passes_give(kind, backend, dtype, config):
    layer, x = made(kind, config, dtype)
    layer.requires_grad_(False)
    near = bounds(dtype)
    with vps.backend(backend):
        J = jacobian(layer, x)
        torch.testing.assert_close(torch.func.jacrev(layer)(x), J, **near)
        vectorized = torch.autograd.functional.jacobian(layer, x, vectorize=True)
        torch.testing.assert_close(vectorized, J, **near)
        y, vjp = torch.func.vjp(layer, x)
        torch.testing.assert_close(y, layer(x), **near)
        g, v = torch.randn_like(y), torch.randn_like(x)
        expected = torch.einsum("abc,abcdef->def", g, J)
        torch.testing.assert_close(vjp(g)[0], expected, **near)
        got = torch.func.grad(lambda x: (layer(x) * g).sum())(x)
        torch.testing.assert_close(got, expected, **near)
        (transposed,) = torch.func.vjp(lambda g: vjp(g)[0], g)[1](v)
        torch.testing.assert_close(transposed, torch.einsum("abcdef,def->abc", J, v), **near)
        several = torch.stack([g, -2 * g])
        torch.testing.assert_close(
            torch.vmap(vjp)(several)[0], torch.stack([expected, -2 * expected]), **near
        )
        many = torch.autograd.grad(
            layer(x.requires_grad_()), x, several, is_grads_batched=True
        )[0]  # fmt: skip
        torch.testing.assert_close(many[1], -2 * expected, **near)


@CASES
@EVERY_CONFIG
@torch.no_grad()
def test_vmap_is_a_loop(kind, backend, dtype, config):
    layer, x = made(kind, config, dtype)
    xs = torch.stack([x, -2 * x, x.flip(0) + 0.5])
    near = bounds(dtype)
    with vps.backend(backend):
        expected = torch.stack([layer(each) for each in xs])
        torch.testing.assert_close(torch.vmap(layer)(xs), expected, **near)
        moved = torch.vmap(layer, in_dims=2, out_dims=1)(xs.movedim(0, 2))
        torch.testing.assert_close(moved, expected.movedim(0, 1), **near)
        twice = torch.vmap(torch.vmap(layer))(xs.unsqueeze(1))
        torch.testing.assert_close(twice, expected.unsqueeze(1), **near)
        if kind == "adapter":
            return
        weights = {name: torch.stack([p, 1.5 * p]) for name, p in layer.named_parameters()}
        call = lambda weights, x: torch.func.functional_call(layer, weights, (x,))  # noqa: E731
        ensemble = torch.vmap(call, (0, None))(weights, x)
        for i in range(2):
            one = call({name: p[i] for name, p in weights.items()}, x)
            torch.testing.assert_close(ensemble[i], one, **near)
        mask = torch.tensor([[True, True, False], [True, False, False]])
        with vps.token_mask(mask):
            expected = torch.stack([layer(each) for each in xs])
            torch.testing.assert_close(torch.vmap(layer)(xs), expected, **near)


@CASES
@EVERY_CONFIG
def test_gradients_of_every_sample(kind, backend, dtype, config):
    layer, x = made(kind, config, dtype)
    xs = torch.stack([x, -2 * x, x.flip(0) + 0.5])
    parameters = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}
    assert parameters

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    with vps.backend(backend):
        got = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, xs)
        for i, each in enumerate(xs):
            layer.zero_grad()
            layer(each).square().sum().backward()
            for name, parameter in layer.named_parameters():
                if name in parameters:
                    torch.testing.assert_close(got[name][i], parameter.grad, **bounds(dtype))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("builder", ["sk", "sc"])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_whole_model(backend, coupled, builder, adapter):
    if adapter and backend == "cpp":
        pytest.skip("adapters are computed by torch alone")
    dtype = torch.float64 if backend == "torch" else torch.float32
    model = tiny("llama", dtype)
    model.config._attn_implementation = "eager"  # SDPA has no second derivative on a CPU
    if adapter:
        lora = LoraConfig(target_modules=["q_proj", "k_proj"], r=2, init_lora_weights=False)
        model = get_peft_model(model, lora).to(dtype).eval()
    vps.patch(model, VPSConfig(builder=builder, qk_coupling=coupled))
    ids = draw(3, 5, seed=1)
    embedded = model.get_input_embeddings()(ids).detach()
    near = {"rtol": 1e-3, "atol": 1e-5} if backend == "cpp" else {"rtol": 1e-7, "atol": 1e-9}

    def run(parameters, x):
        options = {"inputs_embeds": x, "use_cache": False}
        return torch.func.functional_call(model, parameters, (), options).logits

    with vps.backend(backend):
        torch.testing.assert_close(
            torch.vmap(lambda x: run({}, x[None])[0])(embedded), run({}, embedded), **near
        )
        parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        each = torch.vmap(
            torch.func.grad(lambda p, x: run(p, x[None]).square().mean()), (None, 0)
        )(parameters, embedded)  # fmt: skip
        for i in range(len(ids)):
            model.zero_grad()
            run({}, embedded[i : i + 1]).square().mean().backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    torch.testing.assert_close(each[name][i], parameter.grad, **near)
        x = embedded.clone().requires_grad_()
        y = run({}, x)
        g = torch.randn_like(y).requires_grad_()
        (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
        v = torch.randn_like(gx)
        (twice,) = torch.autograd.grad(gx, g, v)
        torch.testing.assert_close((g * twice).sum(), (gx * v).sum(), rtol=1e-3, atol=1e-4)


def test_curvature_pairs_are_in_second_derivatives_and_transforms():
    layer, x = made("weight", VPSConfig(), torch.float64)
    layer.memory = vps.algorithm.lbfgs.CurvatureMemory()
    for scale in (1.0, 2.0, 4.0):
        layer.memory.record(torch.arange(5.0).double() * scale, torch.ones(5).double() * scale**2)
    assert layer.memory.pairs
    J = jacobian(layer, x)
    torch.testing.assert_close(torch.func.jacrev(layer)(x), J)
    x.requires_grad_()
    y = layer(x)
    g = torch.randn_like(y).requires_grad_()
    (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
    v = torch.randn_like(gx)
    torch.testing.assert_close(
        torch.autograd.grad(gx, g, v)[0], torch.einsum("abcdef,def->abc", J, v)
    )


@CASES
def test_forward_mode_is_refused_in_every_way(kind, backend, dtype):
    layer, x = made(kind, VPSConfig(), dtype)
    assert kind == "adapter" or isinstance(layer, SharpenedLayer)
    with vps.backend(backend):
        for call in (
            lambda: torch.func.jvp(layer, (x,), (x,)),
            lambda: torch.func.jacfwd(layer)(x),
            lambda: torch.func.hessian(lambda x: layer(x).sum())(x),
            lambda: torch.func.linearize(layer, x),
        ):
            with pytest.raises(NotImplementedError, match="tangent of forward-mode"):
                call()


@pytest.mark.parametrize(
    ("dtype", "builder"),
    [(torch.float64, "sc"), (torch.float32, "sk")],  # in torch, and as one operator
)
def test_compiled_transforms(dtype, builder):
    torch._dynamo.reset()
    layer, x = made("weight", VPSConfig(builder=builder), dtype)
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def each(weights, xs):
        loss = lambda w, x: torch.func.functional_call(layer, w, (x,)).square().sum()  # noqa: E731
        return torch.vmap(torch.func.grad(loss), (None, 0))(weights, xs)

    def pulled(x):
        y, vjp = torch.func.vjp(layer, x)
        return vjp(torch.ones_like(y))[0]

    xs = torch.stack([x, -2 * x])
    for call, arguments in (
        (lambda x: torch.func.grad(lambda x: layer(x).square().sum())(x), (x,)),
        (torch.func.jacrev(layer), (x,)),
        (pulled, (x,)),
        (torch.vmap(layer), (xs,)),
        (each, (weights, xs)),
    ):
        compiled = torch.compile(call, backend="eager")(*arguments)
        torch.testing.assert_close(compiled, call(*arguments), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.functionalize(layer)(x), layer(x), rtol=1e-4, atol=1e-5)


def test_forward_mode_by_the_weights_of_an_adapter_is_refused():
    layer, x = made("adapter", VPSConfig(), torch.float64)
    weights = {n: p.detach() for n, p in layer.named_parameters() if "lora" in n}
    call = lambda weights: torch.func.functional_call(layer, weights, (x,))  # noqa: E731
    with pytest.raises(NotImplementedError, match="tangent of forward-mode"):
        torch.func.jvp(call, (weights,), (weights,))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_the_update_is_no_part_of_the_gradient_of_weights_from_outside(backend):
    """``∂L/∂W = gᵀx`` also where a transform does not differentiate W, or maps over it."""
    if vps.backends()[backend] is not None:
        pytest.skip(f"{backend}: {vps.backends()[backend]}")
    torch.manual_seed(0)
    layer = VPSLinear(8, 6, dtype=torch.float64)
    x, g = torch.randn(4, 8).double(), torch.randn(4, 6).double()
    with vps.backend("torch"):
        (torch.func.vjp(layer, x)[0] * g).sum().backward()
        torch.testing.assert_close(layer.weight.grad, g.T @ x)
    dtype = torch.float32 if backend == "cpp" else torch.float64
    weights, x = torch.randn(3, 6, 8, dtype=dtype), x.to(dtype)
    with vps.backend(backend):
        found = torch.func.grad(lambda W: torch.vmap(lambda w: vps.vps_linear(x, w))(W).sum())(
            weights
        )
    expected = torch.ones(4, 6, dtype=dtype).T @ x
    torch.testing.assert_close(found, expected.expand(3, -1, -1), rtol=1e-5, atol=1e-5)
