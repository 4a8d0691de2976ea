"""Arguments that the C++ operators refuse, each by name."""

import pytest
import torch

from vps.algorithm.policy import Settings
from vps.backends import cpp

pytestmark = pytest.mark.skipif(
    cpp.why_missing() is not None,
    reason=f"no C++ backend: {cpp.why_missing()}",
)

GOOD = {
    "x": torch.randn(2, 3, 8),
    "weight": torch.randn(6, 8),
    "bias": torch.randn(6),
    "mask": torch.ones(2, 3, dtype=torch.bool),
    "I_in": torch.tensor([[0, 1], [2, 7]]),
    "I_out": torch.tensor([[0, 1], [2, 5]]),
    "policy": torch.tensor([1, 0.5, 0.5, 2, 2, 2, 2, 1, 1], dtype=torch.float64),
    "entropy": torch.tensor([1.0, 1.0], dtype=torch.float64),
    "H": torch.randn(2, 3, 6),
    "energy": torch.rand(2),
}
SETTINGS = {
    "r": 2,
    "adaptive": True,
    "coupled": True,
    "second_order": True,
    "alpha": 1e-3,
    "tau": 0.8,
    "clip": "component",
    "clamp": 1.0,
}
ERRORS = [
    ("x", torch.randn(2, 3, 8).double(), "x must be float32, bfloat16 or float16, got float64"),
    ("x", torch.randn(3, 8), "x must have shape [G, T, d_in], got [3, 8]"),
    ("x", torch.randn(2, 3, 9), "x must have shape [2, 3, 8], got [2, 3, 9]"),
    ("x", torch.randn(2, 0, 8), "x must not be empty, got [2, 0, 8]"),
    ("weight", torch.randn(6, 8).half(), "weight must be float32, got float16"),
    ("weight", torch.randn(6), "weight must have shape [d_out, d_in], got [6]"),
    ("weight", torch.randn(0, 8), "weight must not be empty, got [0, 8]"),
    ("bias", torch.randn(5), "bias must have shape [6], got [5]"),
    ("bias", torch.randn(6).double(), "bias must be float32, got float64"),
    ("mask", torch.ones(2, 3), "mask must be bool, got float32"),
    ("mask", torch.ones(3, 2, dtype=torch.bool), "mask must have shape [2, 3], got [3, 2]"),
    ("I_in", torch.tensor([[0, 1], [2, 8]]), "I_in must hold features from 0 to 7, got 8"),
    ("I_out", torch.tensor([[0, -1], [2, 3]]), "I_out must hold features from 0 to 5, got -1"),
    ("I_in", torch.zeros(2, 2, dtype=torch.int32), "I_in must be int64, got int32"),
    ("I_out", torch.zeros(2, 3, dtype=torch.int64), "I_out must have shape [2, 2], got [2, 3]"),
    ("policy", torch.zeros(9), "policy must be float64, got float32"),
    ("policy", torch.zeros(8).double(), "policy must have shape [9], got [8]"),
    ("policy", torch.full((9,), float("nan")).double(), "policy must be finite, got nan"),
    ("entropy", torch.ones(1).double(), "entropy must have shape [2], got [1]"),
    ("entropy", torch.ones(2), "entropy must be float64, got float32"),
    ("H", torch.randn(2, 3, 8), "H must have shape [2, 3, 6], got [2, 3, 8]"),
    ("H", torch.randn(2, 3, 6).half(), "H must be float32, got float16"),
    ("energy", torch.rand(3), "energy must have shape [2], got [3]"),
    ("energy", torch.rand(2).double(), "energy must be float32, got float64"),
    ("energy", torch.tensor([1.0, -1.0]), "energy must not be negative, got -1"),
    ("energy", torch.tensor([float("nan"), 1.0]), "energy must not be negative, got nan"),
    ("r", 0, "r must be from 1 to min(d_in, d_out) = 6, got 0"),
    ("r", 7, "r must be from 1 to min(d_in, d_out) = 6, got 7"),
    ("alpha", 0.0, "alpha must be positive and finite, got 0"),
    ("tau", -1.0, "tau must be positive, got -1"),
    ("clamp", -0.5, "clamp must not be negative, got -0.5"),
]  # fmt: skip


def linear(**arguments):
    """Call the operator with tensors and the fields of Settings by name."""
    rules, numbers = Settings(**{name: arguments.pop(name) for name in SETTINGS}).packed()
    return torch.ops.vps.linear(**arguments, rules=rules, numbers=numbers)


@pytest.mark.parametrize("name, value, message", ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_errors(name, value, message):
    linear(**GOOD, **SETTINGS)
    with pytest.raises((RuntimeError, ValueError)) as error:
        linear(**GOOD | SETTINGS | {name: value})
    assert f"vps::linear: {message}" in str(error.value)


@pytest.mark.parametrize("rules, numbers", [([], [0.1, 0, 0]), ([2] * 7, []), ([2] * 8, [0.1] * 3)])
def test_settings_that_are_not_packed(rules, numbers):
    with pytest.raises(
        (RuntimeError, ValueError), match="rules must hold 7 integers and numbers 3"
    ):
        torch.ops.vps.linear(**GOOD, rules=rules, numbers=numbers)


BACKWARD = {
    "g": torch.randn(2, 3, 6),
    "weight": torch.randn(6, 8),
    "features": torch.tensor([[[0, 1], [2, 5]], [[7, 3], [1, 0]]]),
    "core": torch.randn(2, 2, 2),
    "gamma": torch.rand(2),
}
BACKWARD_ERRORS = [
    ("g", torch.randn(2, 3, 6).double(), "g must be float32, bfloat16 or float16, got float64"),
    ("g", torch.randn(3, 6), "g must have shape [G, T, d_out], got [3, 6]"),
    ("g", torch.randn(2, 3, 8), "g must have shape [2, 3, 6], got [2, 3, 8]"),
    ("g", torch.randn(2, 0, 6), "g must not be empty, got [2, 0, 6]"),
    ("weight", torch.randn(6, 8).half(), "weight must be float32, got float16"),
    ("features", torch.zeros(2, 2), "features must be [G, 2, r], got [2, 2]"),
    ("features", torch.zeros(2, 2, 2), "features must be int64, got float32"),
    ("features", torch.zeros(2, 2, 7).long(), "features must hold 1 to min(d_in, d_out) = 6 a s"),
    ("features", torch.full((2, 2, 2), 6), "features[:, 1] must hold features from 0 to 5, got 6"),
    ("features", torch.full((2, 2, 2), -1), "features[:, 0] must hold features from 0 to 7, got"),
    ("core", torch.randn(2, 2), "core must have shape [2, 2, 2], got [2, 2]"),
    ("core", torch.randn(2, 2, 2).half(), "core must be float32, got float16"),
    ("gamma", torch.rand(3), "gamma must have shape [2], got [3]"),
    ("gamma", torch.rand(2).double(), "gamma must be float32, got float64"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, value, message", BACKWARD_ERRORS, ids=[e[2][:40] for e in BACKWARD_ERRORS]
)
def test_errors_of_the_backward_pass(name, value, message):
    torch.ops.vps.linear_backward(**BACKWARD)
    with pytest.raises((RuntimeError, ValueError)) as error:
        torch.ops.vps.linear_backward(**BACKWARD | {name: value})
    assert f"vps::linear_backward: {message}" in str(error.value)


def test_ten_thousand_bad_calls():
    """Random wrong arguments raise and never crash; those that happen to be right run."""
    random = torch.Generator().manual_seed(0)

    def pick(values):
        return values[int(torch.randint(len(values), (), generator=random))]

    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8]
    dtypes += [torch.complex64, torch.int32, torch.float8_e4m3fn]

    def tensor():
        shape = [pick([0, 1, 2, 3, 6, 8, 9]) for _ in range(pick([0, 1, 2, 3, 4]))]
        kind = pick(["plain"] * 6 + ["strided", "expanded", "sparse"])
        dtype = pick(dtypes)
        out = torch.zeros(shape).to(dtype)
        if kind == "strided" and out.dim() > 1:
            out = out.transpose(0, -1)
        if kind == "expanded" and out.dim() > 0:
            out = out[:1].expand(shape) if shape[0] else out
        return out.to_sparse() if kind == "sparse" and dtype is not torch.float8_e4m3fn else out

    wrong_index = torch.tensor([[0, 1], [2**62, -(2**62)]])
    tensors, good = list(GOOD), GOOD | SETTINGS
    optional = {"bias", "mask", "I_in", "I_out", "entropy", "H", "energy", "tau", "clamp"}
    raised = 0
    while raised < 10_000:
        name = pick(list(good))
        if name in ("I_in", "I_out") and pick([True, False]):
            value = wrong_index
        elif name in tensors:
            value = tensor()
        elif name == "r":
            value = pick([-(2**63), -1, 0, 1, 3, 64, 2**31, 2**63 - 1])
        elif isinstance(good[name], bool):
            value = pick([True, False])
        else:
            value = pick([float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e300, 1e-300])
        arguments = good | {name: value}
        if pick([True, False]):
            arguments[pick(list(optional))] = None
        try:
            linear(**arguments)
        except (RuntimeError, ValueError, NotImplementedError):
            raised += 1
