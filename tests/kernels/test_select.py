"""Kernel of the selection against a stable sort."""

import pytest
import torch

pytest.importorskip("triton")
from vps import reference
from vps.kernels import select

pytestmark = pytest.mark.usefixtures("poison")


def expected(scores, k):
    return torch.stack([reference.top_k(row, k) for row in scores.cpu()])


def check(scores, k):
    selected = select.launch(scores, k)
    assert selected.dtype == torch.int64
    assert torch.equal(selected.cpu(), expected(scores, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width, k", [(1, 1), (8, 8), (33, 5), (70, 64), (4097, 1), (9000, 8)])
def test_select(device, dtype, width, k):
    scores = torch.rand(3, width, device=device).to(dtype)
    check(scores, k)
    check(scores * 1e-38, k)  # beside zero, down to the subnormal
    check((scores * 4).round(), k)  # ties
    check(scores * 0, k)


def test_float64_beyond_float32(device):
    scores = 1 + torch.arange(40, device=device, dtype=torch.float64).flip(0)[None] * 2.0**-50
    check(scores, 8)
    check(scores * 1e200, 8)


def test_largest(device):
    """262,144 scores with the best in the last chunk, beside ties over chunks."""
    scores = torch.rand(1, 262_144, device=device).round(decimals=4)
    scores[0, -1] = 2.0
    scores[0, [5, 100_000]] = 1.5
    assert scores.shape[1] > select.LARGEST_CHUNK
    check(scores, 4)


def test_many_of_many_chunks(device):
    scores = torch.zeros(2, 8200, device=device)
    scores[0, 8195:] = 1.0
    scores[1, ::100] = torch.rand(82, device=device)
    check(scores, 64)


def test_signs_and_infinity(device):
    scores = torch.tensor([[-0.0, 0.0, float("inf"), 1.0, float("inf")]], device=device)
    assert select.launch(scores, 5).tolist() == [[2, 4, 3, 0, 1]]
    scores[0, 2] = float("nan")
    assert select.launch(scores, 3).tolist() == [[4, 3, 0]]


def test_strides(device):
    scores = torch.rand(50, 6, device=device)
    check(scores.T, 4)
    check(scores[::2], 3)
    check(scores[:1].expand(3, 6), 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [9, 4500])
def test_values_of_one_token(device, dtype, width):
    values = torch.randn(2, width, device=device).to(dtype)
    values[0, 1], values[1, 3], values[1, 4] = float("nan"), float("inf"), -float("inf")
    clean = torch.where(values.isfinite(), values, 0).abs()
    assert torch.equal(select.launch(values, 8, True).cpu(), expected(clean, 8))


def test_a_group_does_not_depend_on_the_others(device):
    scores = torch.rand(3, 5000, device=device)
    selected = select.launch(scores, 8)
    assert torch.equal(selected, select.launch(scores, 8))
    for group in range(3):
        assert torch.equal(selected[group : group + 1], select.launch(scores[group][None], 8))


def test_no_group(device):
    assert select.launch(torch.empty(0, 5, device=device), 2).shape == (0, 2)


def test_errors():
    scores = torch.ones(2, 3)
    with pytest.raises(TypeError, match="float32 or float64, got torch.float16"):
        select.launch(scores.half(), 1)
    with pytest.raises(ValueError, match=r"scores must be \[G, d\]"):
        select.launch(scores[0], 1)
    for k in (0, 4):
        with pytest.raises(ValueError, match="k must be from 1 to 3"):
            select.launch(scores, k)
    with pytest.raises(ValueError, match="k must be from 1 to 64"):
        select.launch(torch.ones(1, 100), 65)
