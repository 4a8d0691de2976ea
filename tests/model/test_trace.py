"""``torch.jit.trace``: a graph that passes its own check, selects anew and has the gradient."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import draw, settings, tiny
from torch import nn

import vps
from vps import VPSConfig, VPSLinear

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"builder": "sc", "order": 2}, {"clamp": 0.1}, {"builder": "random"}, {"scope": "batch"}],
    ids=str,
)
def test_a_trace_passes_its_own_check_at_the_first_call(changes, backend, frozen):
    """What is made once and kept must not be in the graph of the first trace alone."""
    torch.manual_seed(0)
    number = hash((str(changes), backend, frozen)) % 1000  # settings that no other test has made
    config = VPSConfig(**changes, gamma_bounds=(0.3, 0.7 + number / 1e5), seed=number)
    layer = VPSLinear(16, 24, config=config).requires_grad_(not frozen)
    x, other = torch.randn(2, 2, 5, 16)
    with vps.backend(backend):
        traced = torch.jit.trace(layer, (x,))
        torch.testing.assert_close(traced(other), layer(other), rtol=1e-4, atol=1e-5)
        found = []
        for each in (traced, layer):
            x = other.clone().requires_grad_()
            layer.zero_grad()
            each(x).square().sum().backward()
            found.append([x.grad] + [p.grad for p in layer.parameters()])
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gpt2", "adapted llama"])
def test_whole_models(family, dtype, tmp_path):
    model = tiny(family.split()[-1], dtype)
    if family.startswith("adapted"):
        lora = LoraConfig(target_modules=["q_proj", "k_proj"], r=2, init_lora_weights=False)
        model = get_peft_model(model, lora).to(dtype).eval()
    vps.patch(model, settings(family.split()[-1], gamma_bounds=(0.3, 0.71)))
    ids, other = draw(2, 2, 7)
    traced = torch.jit.trace(Logits(model), (ids,))
    traced.save(tmp_path / "traced.pt")
    expected = model(other).logits
    for each in (traced, torch.jit.load(tmp_path / "traced.pt")):
        torch.testing.assert_close(each(other), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 5), (2, 5)])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize(
    "changes", [{}, {"builder": "sc"}, {"scope": "batch"}, {"scope": "token"}, {"clamp": 0.1}]
)
@torch.no_grad()
def test_a_trace_holds_for_every_number_of_sequences_and_tokens(changes, backend, shape):
    torch.manual_seed(0)
    layer = VPSLinear(16, 16, config=VPSConfig(**changes))
    with vps.backend(backend):
        traced = torch.jit.trace(layer, (torch.randn(*shape, 16),))
        for other in ((2, 20), (1, 3), (5, 7), (200, 400)):
            x = torch.randn(*other, 16)
            torch.testing.assert_close(traced(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@torch.no_grad()
def test_a_layer_where_no_tracing_state_may_be_set(backend):
    """As in what vLLM compiles."""
    number = 0.71 + (backend == "cpp") / 1e4  # settings that no other test has made
    layer = VPSLinear(16, 24, config=VPSConfig(gamma_bounds=(0.3, number)))
    x = torch.randn(2, 5, 16)
    tracer = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("Tracer"))
    with vps.backend(backend):
        with torch._C._ExcludeDispatchKeyGuard(tracer):
            y = layer(x)
        torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_a_trace_of_an_x_that_was_just_used_selects_anew(backend):
    if vps.backends()[backend] is not None:
        pytest.skip(f"{backend}: {vps.backends()[backend]}")
    torch.manual_seed(0)
    layer = VPSLinear(24, 16).requires_grad_(False)
    x, other = torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    with vps.backend(backend):
        layer(x)
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        torch.testing.assert_close(traced(other), layer(other))
