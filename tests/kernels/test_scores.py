"""Kernel of the column scores against torch in float64."""

import pytest
import torch
from cases import FAR

pytest.importorskip("triton")
from vps.kernels import scores

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def expected(values, mask):
    clean = values.double().cpu()
    clean = torch.where(clean.isfinite(), clean, 0.0)
    counted = torch.ones(values.shape[:2]) if mask is None else mask.double().cpu()
    clean = clean * counted[..., None]
    elements = counted.sum(1).clamp(min=1) * values.shape[2]
    return clean.abs().sum(1), clean.square().sum((1, 2)) / elements


def check(values, mask, energy=True):
    s, E = scores.launch(values, mask, energy)
    s_expected, E_expected = expected(values, mask)
    accuracy = 1e-14 if values.dtype == torch.float64 else 1e-6
    assert s.dtype == E.dtype == scores.accumulation(values.dtype)[0]
    torch.testing.assert_close(s.double().cpu(), s_expected, rtol=accuracy, atol=0)
    if energy:
        torch.testing.assert_close(E.double().cpu(), E_expected, rtol=accuracy, atol=0)
    else:
        assert E.shape == (0,)
    return s, E


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 1, 33), (1, 1, 600), (2, 7, 3), (3, 65, 17), (1, 200, 520), (1, 64, 1)]
)
def test_scores(device, dtype, shape):
    values = torch.randn(shape, device=device).to(dtype)
    check(values, None)
    check(values, None, energy=False)
    mask = torch.rand(shape[:2], device=device) < 0.6
    mask[0] = False
    s, E = check(values, mask)
    assert not s[0].any() and E[0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_counts_zero(device, dtype):
    values = torch.randn(2, 70, 9, device=device).to(dtype)
    values[0, 3, 2] = float("nan")
    values[0, 66] = float("inf")
    values[1, 0, 0] = -float("inf")
    values[1, :, 5] = float("nan")
    check(values, None)


def test_strides(device):
    values = torch.randn(40, 3, 22, device=device)
    check(values.transpose(0, 1), None)
    check(values.permute(2, 0, 1), None)
    check(values[:, :, ::3], None)
    check(values[:1].expand(5, 3, 22), None)
    mask = torch.rand(3, 40, device=device) < 0.5
    check(values, mask.T)
    check(values.transpose(0, 1), mask)


def test_beyond_2_31_elements(device, sparse):
    """Rows 2^30 + 1 elements apart, in a file of which four rows are ever touched."""
    width = 5
    values = sparse.as_strided((1, 4, width), (0, FAR, 1))
    values.copy_(torch.randn(1, 4, width))
    check(values, None)
    check(values.transpose(0, 1), None)


@pytest.mark.parametrize("tokens", [1, 70])
def test_a_group_does_not_depend_on_the_others(device, tokens):
    values = torch.randn(4, tokens, 530, device=device)
    mask = torch.rand(4, tokens, device=device) < 0.8
    s, E = scores.launch(values, mask, True)
    again, E_again = scores.launch(values, mask, True)
    assert torch.equal(s, again) and torch.equal(E, E_again)
    for group in range(4):
        alone = slice(group, group + 1)
        s_alone, E_alone = scores.launch(values[alone].clone(), mask[alone], True)
        assert torch.equal(s[alone], s_alone) and torch.equal(E[alone], E_alone)


def test_nothing_to_sum(device):
    assert scores.launch(torch.empty(0, 3, 4, device=device), None, True)[0].shape == (0, 4)
    s, E = scores.launch(torch.empty(2, 0, 4, device=device), None, True)
    assert not s.any() and not E.any()


def test_errors():
    values = torch.ones(2, 3, 4)
    with pytest.raises(TypeError, match="int64"):
        scores.launch(values.long(), None, True)
    with pytest.raises(ValueError, match=r"values must be \[G, T, d\]"):
        scores.launch(values[0], None, True)
    with pytest.raises(ValueError, match="mask must be bool"):
        scores.launch(values, torch.ones(2, 4, dtype=torch.bool), True)
