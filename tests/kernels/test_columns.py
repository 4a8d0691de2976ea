"""Kernels that gather columns of W against indexing, with the sums of squares in float64."""

import pytest
import torch
from cases import FAR

pytest.importorskip("triton")
from vps.kernels import columns, scores
from vps.kernels.prefill import features

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def check(found, W, I_in):
    """Columns bitwise, and their squared norms."""
    groups, r = I_in.shape
    assert found.every == (groups * r > W.shape[1])
    slots = I_in if found.every else torch.arange(groups * r, device=W.device).view(groups, r)
    wanted = W.T[I_in]
    assert torch.equal(found.values[slots].nan_to_num(9), wanted.nan_to_num(9))
    squares, accuracy = found.squares[:, slots].sum(0), 1e-14 if W.dtype == torch.float64 else 1e-6
    wide = wanted.double().square().sum(2)
    torch.testing.assert_close(squares.double(), wide, rtol=accuracy, atol=0, equal_nan=True)


def drawn(groups, r, d_in, device):
    return torch.stack([torch.randperm(d_in, device=device)[:r] for _ in range(groups)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "d_out, d_in, groups, r",
    [(1, 1, 1, 1), (1100, 20, 3, 4), (9, 70, 1, 64), (130, 100, 40, 3), (33, 5, 9, 5)],
)
def test_columns(device, dtype, d_out, d_in, groups, r):
    """The last two ask for more columns than W has, so W is transposed."""
    W = torch.randn(d_out, d_in, device=device).to(dtype)
    I_in = drawn(groups, r, d_in, device)
    check(columns.launch(W, I_in), W, I_in)


def test_only_columns_in_use_are_written(device):
    W = torch.randn(70, 130, device=device)
    I_in = torch.tensor([[3, 129]], device=device).expand(70, 2)
    found = columns.launch(W, I_in)
    check(found, W, I_in)
    assert found.values.isfinite().all(1).nonzero().flatten().tolist() == [3, 129]


@pytest.mark.parametrize("groups", [2, 30])
def test_strides_and_what_is_not_finite(device, groups):
    W = torch.randn(40, 24, device=device)
    W[3, 5], W[:, 7] = float("nan"), float("inf")
    I_in = drawn(groups, 4, 24, device)
    for weight in (W.T.contiguous().T, W.repeat(1, 2)[:, ::2][:, :24], W[::2]):
        for index in (I_in, I_in.T.contiguous().T, I_in[:1].expand(groups, 4)):
            check(columns.launch(weight, index), weight, index)


@pytest.mark.parametrize("groups", [1, 4])
def test_beyond_2_31_elements(device, sparse, groups):
    weight = sparse.as_strided((4, 6), (FAR, 1))
    weight.copy_(torch.randn(4, 6))
    for W in (weight, weight.T):
        I_in = torch.tensor([[3, 0]]).expand(groups, 2)
        check(columns.launch(W, I_in), W, I_in)


@pytest.mark.parametrize("tokens", [1, 40])
def test_along_with_a_pass_over_H(device, tokens):
    """The same bits as by a launch of their own, whichever pass takes them along."""
    W, H = torch.randn(600, 50, device=device), torch.randn(2, tokens, 600, device=device)
    I_in = drawn(2, 4, 50, device)
    alone = columns.launch(W, I_in)
    for taken_along, rest in (
        (lambda found: scores.launch(H, None, True, found), scores.launch(H, None, True)),
        (lambda found: features.rank(H, None, 4, True, found), features.rank(H, None, 4, True)),
    ):
        found = columns.new(W, I_in)
        result = taken_along(found)
        check(found, W, I_in)
        assert torch.equal(found.values, alone.values) and torch.equal(found.squares, alone.squares)
        assert all(torch.equal(one, other) for one, other in zip(result, rest, strict=True))


def test_errors():
    W, I_in = torch.ones(3, 4), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="int64"):
        columns.launch(W.long(), I_in)
    with pytest.raises(ValueError, match=r"columns: weight must be \[d_out, d_in\]"):
        columns.launch(W[0], I_in)
    for index in (I_in.int(), I_in[0]):
        with pytest.raises(ValueError, match=r"columns: I_in must be int64 \[G, r\]"):
            columns.launch(W, index)
