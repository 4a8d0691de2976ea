"""Launched again by pointers alone, a step has the bits of a launch through Triton."""

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.interpreter import GridExecutor

from vps.kernels import device
from vps.kernels.decode import again, decode

pytestmark = pytest.mark.usefixtures("poison")
PLAIN = 4, True, 0.8, None
NUMBERS = [1.0, 0.3, 0.8, 1, 4, 32, 32, 1, 1]


class Compiled:
    """What Triton returns of a launch, for a kernel that the interpreter runs."""

    function, packed_metadata = "handle", "metadata"

    def __init__(self, executor, arguments, options):
        self.executor, self.arguments, self.options = executor, arguments, options

    def run(self, x, y, z, stream, function, metadata, entering, enter, leave, *arguments):
        assert (function, metadata, entering, enter, leave) == ("handle", "metadata", *[None] * 3)
        assert self.executor.grid == (x, y, z)[: len(self.executor.grid)]
        tensors = [_tensor(*pair) for pair in zip(arguments, self.arguments, strict=True)]
        CALL(self.executor, *tensors, **self.options)
        STARTED.append(self.executor.fn.__name__)


CALL, STARTED = GridExecutor.__call__, []


def _noted(launch):
    def noted(*arguments):
        found = launch(*arguments)
        STARTED.extend(["step"] * (found is not None))
        return found

    return noted


def _tensor(value, like):
    """Return a tensor at an address, of the dtype of the one that was there first."""
    if isinstance(like, tuple):
        return tuple(_tensor(*pair) for pair in zip(value, like, strict=True))
    if not isinstance(like, torch.Tensor):
        assert value == like
        return value
    assert type(value) is int and value % 16 == like.data_ptr() % 16
    return At(value, like)


class At(torch.Tensor):
    """A tensor that lies at an address, of which the interpreter reads no more."""

    @staticmethod
    def __new__(cls, address, like):
        made = torch.Tensor._make_subclass(cls, torch.zeros(1, dtype=like.dtype))
        made.address = address
        return made

    def data_ptr(self):
        return self.address

    def new_empty(self, *args, **kwargs):
        return self

    def set_(self, *args, **kwargs):
        return self


@pytest.fixture(autouse=True)
def steps(monkeypatch, device):
    """Note in STARTED what is launched again; in the interpreter, by pointers as on a GPU."""
    monkeypatch.setattr(again, "_KNOWN", {})
    STARTED.clear()
    if device == "cuda":
        monkeypatch.setattr(again._Again, "launch", _noted(again._Again.launch))
    else:

        def call(executor, *arguments, **options):
            CALL(executor, *arguments, **options)
            return Compiled(executor, arguments, options)

        class Driver:
            def get_current_stream(self, device):
                return 0

        monkeypatch.setattr(GridExecutor, "__call__", call)
        monkeypatch.setattr(again, "driver", type("", (), {"active": Driver()}))
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


def layer(d_out, d_in, dtype, bias=True, factors=()):
    W = (torch.randn(d_out, d_in) / d_in**0.5).to(dtype)
    numbers = torch.tensor([*NUMBERS, *factors], dtype=torch.float64)
    return decode.Layer(W, torch.randn(d_out).to(dtype) if bias else None, numbers)


def check(make, rules=PLAIN, heads=None):
    """Compare three steps of one kind; the second and the third are launched again."""
    for turn in range(3):
        x, layers, mask, I_in, entropy = make()
        STARTED.clear()
        ys, chosen = again.launch(x, layers, mask, I_in, entropy, rules, heads)
        assert bool(STARTED) == (turn > 0)
        wanted = decode.launch(x, layers, mask, I_in, None, entropy, *rules, heads)
        for y, one in zip(ys, wanted, strict=True):
            assert y.shape == one.y.shape and torch.equal(y, one.y)
        assert torch.equal(chosen, wanted[0].features[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 11])
@pytest.mark.parametrize("given", [False, True])
def test_a_layer(dtype, tokens, given):
    def make():
        x = torch.randn(tokens, 1, 96).to(dtype)
        I_in = torch.stack([torch.randperm(96)[:4] for _ in range(tokens)]) if given else None
        return x, [layer(72, 96, dtype)], None, I_in, None

    check(make)


@pytest.mark.parametrize("fixed", [False, True])
def test_all_that_a_layer_may_have(fixed):
    rules = 3, not fixed, 0.1, 0.05

    def make():
        mask = torch.rand(5, 1) < 0.7
        entropy = torch.rand(2, dtype=torch.float64) + 0.5
        x = torch.randn(5, 1, 64).half()
        layers = [layer(40, 64, torch.float16, factors=[0.5, 1.0, 2.0])]
        return x, layers, mask, None, entropy

    check(make, rules)


def test_layers_of_one_x():
    def make():
        layers = [layer(width, 64, torch.bfloat16, bias=width < 40) for width in (48, 32)]
        return torch.randn(2, 1, 64).bfloat16(), layers, None, None, None

    check(make)


@pytest.mark.parametrize("others", [0, 1])
def test_a_query_and_a_key(others):
    """They select together; the value beside them selects by itself."""

    def make():
        widths = [64, 32, 24][: 2 + others]
        layers = [layer(width, 64, torch.bfloat16) for width in widths]
        return torch.randn(3, 1, 64).bfloat16(), layers, None, None, None

    check(make, heads=(8, 4))
    x, layers, *rest = make()
    rules = 4, True, 0.8, None
    together = decode.launch(x, layers, *rest[:2], None, None, *rules, (8, 4))
    alone = decode.launch(x, layers[:2], *rest[:2], None, None, *rules, (8, 4))
    alone += [decode.launch(x, [one], *rest[:2], None, None, *rules)[0] for one in layers[2:]]
    for one, own in zip(together, alone, strict=True):
        for part, other in zip(one, own, strict=True):
            assert torch.equal(part, other)


def test_a_pointer_to_no_multiple_of_16():
    """Triton compiled for multiples: another kernel, found by Triton."""
    layers = [layer(32, 64, torch.bfloat16)]
    memory = torch.randn(72).bfloat16()
    for turn, start in enumerate((0, 8, 1)):
        x = memory[start : start + 64].view(1, 1, 64)
        STARTED.clear()
        (y,), _ = again.launch(x, layers, None, None, None, PLAIN)
        assert bool(STARTED) == (turn == 1)
        wanted = decode.launch(x, layers, None, None, None, None, 4, True, 0.8, None)
        assert torch.equal(y, wanted[0].y)


def test_a_profiler_hears_of_every_launch(monkeypatch):
    layers = [layer(32, 64, torch.bfloat16)]
    x = torch.randn(1, 1, 64).bfloat16()
    again.launch(x, layers, None, None, None, PLAIN)
    heard = []
    device.knobs.runtime.launch_enter_hook.add(heard.append)
    try:
        again.launch(x, layers, None, None, None, PLAIN)
        assert not STARTED
    finally:
        device.knobs.runtime.launch_enter_hook.remove(heard.append)
    again.launch(x, layers, None, None, None, PLAIN)
    assert STARTED


def test_what_is_not_taken():
    x, wide = torch.randn(1, 1, 64), torch.randn(17, 1, 64)
    one = layer(32, 64, torch.float32)
    assert again.launch(wide, [one], None, None, None, PLAIN) is None
    assert again.launch(x, [one], None, None, None, (9, *PLAIN[1:])) is None


def test_few_kinds_are_remembered(monkeypatch):
    monkeypatch.setattr(again, "MOST_KINDS", 3)
    for width in range(16, 26):
        one = layer(width, 64, torch.bfloat16)
        again.launch(torch.randn(1, 1, 64).bfloat16(), [one], None, None, None, PLAIN)
        assert len(again._KNOWN) <= 3
