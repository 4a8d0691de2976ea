"""Kernels are launched where their tensors are; shown with fake tensors of a second GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from vps.kernels import columns, entropy, scores, select, tuning
from vps.kernels.decode import apply, couple, decode, edited, gemv
from vps.kernels.prefill import core, delta, factors, features, gram


class Kernel:
    """Notes the current device of each launch."""

    def __init__(self, current, seen):
        self.current, self.seen = current, seen

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.seen.append(self.current[-1])


@pytest.fixture
def seen(monkeypatch):
    current, seen = [0], []

    def exchange(device):
        before = current[-1]
        if device >= 0:
            current.append(device)
        return before

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    modules = apply, columns, core, couple, delta, edited, entropy, factors, features, gemv, gram
    for module in (*modules, scores, select):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Kernel(current, seen))
    yield seen
    assert current[-1] == 0  # as it was


def new(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="cuda:1")


def index():
    return new(2, 4, dtype=torch.int64)


def policy():
    return new(9, dtype=torch.float64)


def token():
    layer = decode.Layer(new(96, 64), None, policy())
    return new(2, 1, 64), [layer], None, index(), None, None, 4, True, 0.8, None


def update():
    core, gamma = new(2, 4, 4), new(2)
    return new(2, 5, 96), None, columns.new(new(96, 64), index()), index(), core, gamma, None, None


def decided():
    found = columns.new(new(96, 64), index())
    return (
        new(2, 5, 64), new(2, 5, 96), new(96, 64), found, index(), policy(), new(2), None, None,
        1e-3, True, 0.8, True,
    )  # fmt: skip


def prompted(tokens):
    return new(2, tokens, 64), new(96, 64), None, index(), new(2, 4, 64)


@pytest.mark.parametrize(
    ("launch", "arguments", "kernels"),
    [
        (columns.launch, lambda: (new(96, 64), index()), 1),
        (columns.launch, lambda: (new(96, 6), index()), 1),  # all of W, transposed
        (core.launch, decided, 2),
        (decode.launch, token, 2),
        (delta.launch, update, 1),
        (edited.launch, lambda: prompted(1), 1),
        (edited.launch, lambda: prompted(20), 1),  # and cuBLAS
        (entropy.launch, lambda: (new(2, 1000),), 2),
        (
            factors.launch,
            lambda: (
                new(96, 64),
                columns.new(new(96, 64), index()),
                index(),
                None,
                policy(),
                new(2),
                None,
                0.8,
                None,
            ),  # fmt: skip
            1,
        ),
        (features.launch, lambda: (new(2, 1000, 5000), None, 4, True), 3),
        (scores.launch, lambda: (new(2, 100, 64), None, True), 2),
        (select.launch, lambda: (new(2, 9000), 4), 2),
        (select.launch, lambda: (new(2, 18944, dtype=torch.bfloat16), 4, True), 1),
    ],
)
def test_kernels_run_on_the_device_of_their_tensors(seen, launch, arguments, kernels):
    with FakeTensorMode():
        launch(*arguments())
    assert seen == [1] * kernels
