"""The sharpened layer on a GPU: right, deterministic, never waiting for the device."""

import copy

import pytest
import torch
from cases import (
    coupled_case,
    coupled_in_float32,
    in_float32,
    random_case,
    reference_of,
    reference_of_pair,
    relative_error,
    sharpened,
    sharpened_pair,
)
from tiny import tiny_llama
from torch import nn

import vps
from vps import VPSConfig, VPSLinear
from vps.algorithm.policy import LayerGamma
from vps.functional import Projection, coupled_vps_linear

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIGS = [
    {},
    {"builder": "sc"},
    {"order": 2, "clip": "spectral", "clamp": 0.05},
    {"scope": "token"},
    {"builder": "random"},
]


def layer_and_input(dtype=torch.bfloat16, tokens=5, d_in=512, d_out=768, **settings):
    torch.manual_seed(0)
    linear = nn.Linear(d_in, d_out, device="cuda", dtype=dtype).requires_grad_(False)
    x = torch.randn(2, tokens, d_in, device="cuda", dtype=dtype)
    return VPSLinear.from_linear(linear, VPSConfig(**settings)), x


def on_gpu(case):
    """A case of one layer or of a pair with its tensors on the GPU."""

    def moved(value):
        if isinstance(value, list):
            return [moved(each) for each in value]
        return value.cuda() if isinstance(value, torch.Tensor) else value

    return {name: moved(value) for name, value in case.items()}


@pytest.mark.parametrize("block", range(10))
def test_float32_equals_the_reference(block):
    torch.backends.cuda.matmul.allow_tf32 = False
    for seed in range(block * 20, block * 20 + 20):
        case, wide = in_float32(random_case(seed))
        y = sharpened(on_gpu(case)).cpu()
        assert relative_error(y, reference_of(wide).y) <= 1e-6, seed


@pytest.mark.parametrize("block", range(10))
def test_coupled_float32_equals_the_reference(block):
    torch.backends.cuda.matmul.allow_tf32 = False
    for seed in range(block * 10, block * 10 + 10):
        case, wide = coupled_in_float32(coupled_case(seed))
        ys = sharpened_pair(on_gpu(case))
        for y, result in zip(ys, reference_of_pair(wide), strict=True):
            assert relative_error(y.cpu(), result.y) <= 1e-6, seed


def test_coupled_layers_never_wait_for_the_device():
    torch.manual_seed(0)
    both = [Projection(torch.randn(n, 256, device="cuda")) for n in (256, 128)]
    for tokens in (1, 40):
        x = torch.randn(2, tokens, 256, device="cuda")
        coupled_vps_linear(x, *both, 4, 2)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            coupled_vps_linear(x.clone(), *both, 4, 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_bfloat16_is_no_worse_than_torch(settings, tokens):
    layer, x = layer_and_input(tokens=tokens, **settings)
    y = layer(x)
    with vps.backend("torch"):
        in_torch = layer(x)
    with vps.backend("reference"):
        wide = copy.deepcopy(layer).double()(x.double())
    theirs = (in_torch.double() - wide).norm()
    assert (y.double() - wide).norm() <= 2 * theirs + 1e-3 * wide.norm()


@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_never_waits_for_the_device(settings, tokens):
    layer, x = layer_and_input(tokens=tokens, **settings)
    layer(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_graph_capture_replays_with_new_input(settings, tokens):
    layer, x = layer_and_input(tokens=tokens, **settings)
    second = VPSLinear.from_linear(layer.to_linear(), layer.config)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x), second(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = layer(x), second(x)
    fresh = torch.randn_like(x)
    x.copy_(fresh)
    graph.replay()
    expected = layer(fresh)
    assert torch.equal(outputs[0], expected) and torch.equal(outputs[1], expected)


@pytest.mark.parametrize("tokens", [1, 40])
@torch.no_grad()
def test_a_replay_follows_entropy_history_and_gamma(tokens):
    """They are read where they lie, so no graph is captured anew."""
    layer, x = layer_and_input(tokens=tokens)
    layer.gamma = gamma = LayerGamma([0.4, 0.3, 0.2, 0.1], x.device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer(x)
    for change in (
        lambda: layer.state.set_entropy(torch.tensor(2.5, device="cuda")),
        lambda: layer.state.record(True),
        lambda: layer.state.set_entropy(0.1),
        lambda: gamma.set([-0.3, 0.2, 0.5, -0.1]),
        layer.state.reset,
    ):
        change()
        graph.replay()
        assert torch.equal(output, layer(x.clone()))


@pytest.mark.parametrize("tokens", [1, 40])
def test_two_runs_and_any_batch_are_bitwise_equal(tokens):
    layer, x = layer_and_input(tokens=tokens)
    H = nn.functional.linear(x, layer.weight)
    y = layer(x)
    assert torch.equal(y, layer(x.clone()))
    if torch.equal(H[:1], nn.functional.linear(x[:1], layer.weight)):  # cuBLAS allows it
        assert torch.equal(y[:1], layer(x[:1].clone()))


def test_two_streams_at_once():
    layer, x = layer_and_input(tokens=1)
    inputs = [torch.randn_like(x) for _ in range(64)]
    expected = [layer(z) for z in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    outputs = []
    for number, z in enumerate(inputs):
        with torch.cuda.stream(streams[number % 2]):
            outputs.append(layer(z))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_layer_that_is_not_on_the_current_device(tokens):
    layer, x = layer_and_input(tokens=tokens)
    there = copy.deepcopy(layer).to("cuda:1")
    y = there(x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(y.cpu(), layer(x).cpu())


@pytest.mark.parametrize("settings", CONFIGS)
def test_gradient_equals_that_of_torch(settings):
    layer, x = layer_and_input(dtype=torch.float32, **settings)
    torch.backends.cuda.matmul.allow_tf32 = False
    gradients = []
    for name in ("triton", "torch"):
        z = x.clone().requires_grad_()
        with vps.backend(name):
            layer(z).square().sum().backward()
        gradients.append(z.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_a_compiled_llama_block():
    model = tiny_llama().cuda()
    ids = torch.randint(0, 50, (1, 6), device="cuda")
    expected = model(ids).logits
    torch._dynamo.reset()
    compiled = torch.compile(model.model.layers[0], fullgraph=True)
    x = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(x, torch.arange(6, device="cuda")[None])
    torch.testing.assert_close(
        compiled(x, position_embeddings=rotary),
        model.model.layers[0](x, position_embeddings=rotary),
        rtol=1e-3,
        atol=1e-3,
    )
    assert expected.isfinite().all()
