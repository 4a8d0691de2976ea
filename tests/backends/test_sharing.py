"""Input selections are shared by layers that read the same x, and never stale."""

import contextlib
import threading
import types

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import vps
from vps import VPSConfig, VPSLinear, token_mask
from vps.algorithm import selection
from vps.backends import sharing


@pytest.fixture
def counted_calls(monkeypatch):
    """How often an input selection is remembered, that is: was computed."""
    calls = []
    remember = sharing.remember

    def record(*arguments):
        calls.append(arguments[2])
        remember(*arguments)

    monkeypatch.setattr(sharing, "remember", record)
    sharing.forget()
    return calls


def layers(count=2, **settings):
    torch.manual_seed(0)
    config = VPSConfig(**settings)
    return [VPSLinear.from_linear(nn.Linear(9, 7), config) for _ in range(count)]


def alone(layer, x):
    sharing.forget()
    return layer(x.clone())


@torch.no_grad()
def test_one_selection_for_the_layers_of_one_x(counted_calls):
    q, k, v = layers(3)
    x = torch.randn(2, 5, 9)
    outputs = [layer(x) for layer in (q, k, v)]
    assert len(counted_calls) == 1
    for layer, y in zip((q, k, v), outputs, strict=True):
        assert torch.equal(y, alone(layer, x))


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "through a view", "freed", "mask", "scope"])
def test_nothing_stale(counted_calls, change):
    first, second = layers(2)
    x = torch.randn(2, 5, 9)
    first(x)
    mask = None
    if change == "in place":
        x.mul_(torch.randn(9))
    elif change == "through a view":
        x[0, 0].fill_(50.0)
    elif change == "freed":
        del x
        assert sharing._LAST.selection is None
        x = torch.randn(2, 5, 9)
    elif change == "scope":
        second.config = second.config.replace(scope="token")
    else:
        mask = torch.tensor([[True] * 2 + [False] * 3] * 2)
    if mask is None:
        assert torch.equal(second(x), alone(second, x))
    else:
        with token_mask(mask):
            y = second(x)
            assert torch.equal(y, alone(second, x))
            mask[:, 2] = True
        with token_mask(mask):
            assert torch.equal(second(x), alone(second, x))


@torch.no_grad()
def test_a_larger_rank_selects_again_and_a_smaller_one_does_not(counted_calls):
    small, large = layers(2, adaptive_rank=False)
    small.config = small.config.replace(rank=1)
    x = torch.randn(5, 9)
    outputs = [layer(x) for layer in (small, large, small)]
    assert len(counted_calls) == 2
    assert torch.equal(outputs[1], alone(large, x)) and torch.equal(outputs[0], outputs[2])


def test_gradients_and_inference_tensors(counted_calls):
    first, second = layers(2)
    x = torch.randn(2, 5, 9, requires_grad=True)
    (first(x) + second(x)).sum().backward()
    assert len(counted_calls) == 1 and x.grad is not None
    with torch.inference_mode():
        z = torch.randn(2, 5, 9)
        first(z)
        z.mul_(torch.randn(9))
        assert torch.equal(second(z), alone(second, z))


@torch.no_grad()
def test_nothing_is_held_after_forward():
    import weakref

    (layer,) = layers(1)
    x = torch.randn(2, 5, 9)
    reference = weakref.ref(x)
    y = layer(x)
    del x
    assert reference() is None and y is not None and sharing._LAST.selection is None


@torch.no_grad()
def test_threads_do_not_share():
    first, second = layers(2)
    x = torch.randn(2, 5, 9)
    first(x)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(sharing._LAST.selection))
    thread.start()
    thread.join()
    assert seen == [None] and torch.equal(second(x), alone(second, x))


def test_scores_overflow_in_order():
    values = torch.full((1, 300, 4), 3e38)
    values[..., 2] = 1.0
    scores, energy = selection.statistics(values, None, None, True)
    assert selection.top_k(scores, 4).tolist() == [[0, 1, 3, 2]]
    assert energy.item() == float("inf")


def test_what_is_remembered_compiles_nothing_anew():
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = VPSLinear(16, 20)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(1, 3, 16)
            torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("backend", ["torch", None])
def test_nothing_of_a_functional_transform_is_kept(backend):
    x, models = torch.randn(5, 9), layers(3)
    parameters, _ = torch.func.stack_module_state(models)
    with contextlib.nullcontext() if backend is None else vps.backend(backend):
        y = torch.func.vmap(lambda own: torch.func.functional_call(models[0], own, (x,)))(
            parameters
        )
        torch.testing.assert_close(y, torch.stack([layer(x) for layer in models]))


@torch.no_grad()
def test_a_capture_shares_with_itself_alone(counted_calls, monkeypatch):
    """What a graph selects is made anew at each replay, so no other graph and no call reads it."""
    first, second = layers(2)
    x, order = torch.randn(2, 5, 9), [(7, 0)]
    state = sharing.state_of
    monkeypatch.setattr(sharing, "state_of", lambda *tensors: (*state(*tensors), *order[0]))

    def selections(*new):
        order[0] = new
        before = len(counted_calls)
        for layer in (first, second, first):
            assert torch.equal(layer(x), alone_in_torch(layer, x))
        return len(counted_calls) - before

    def alone_in_torch(layer, x):
        kept, sharing._LAST.selection = sharing._LAST.selection, None
        calls = len(counted_calls)
        y = layer(x.clone())
        del counted_calls[calls:]
        sharing._LAST.selection = kept
        return y

    for new in ((7, 0), (7, 1), (7, 2), (8, 2), (7, 0)):
        assert selections(*new) == 1, new


def test_a_capture_has_a_number(monkeypatch):
    """As the driver gives it; without one nothing is shared."""
    x = types.SimpleNamespace(device="cuda:0")
    stream = types.SimpleNamespace(cuda_stream=7)
    capturing, code = [False], [0]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])

    def driver(handle, status, number, *others):
        assert handle.value == 7 and others == (None, None, None)
        status._obj.value, number._obj.value = 1, 2**40 + 3
        return code[0]

    monkeypatch.setattr(sharing, "_driver", lambda: driver)
    assert sharing._order(x) == (7, 0)
    capturing[0] = True
    assert sharing._order(x) == (7, 2**40 + 3)
    code[0] = 1
    assert sharing._order(x) is None
    monkeypatch.setattr(sharing, "_driver", lambda: None)
    assert sharing._order(x) is None
