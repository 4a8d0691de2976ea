"""Kernel that scores and selects at once against a stable sort of the scores in float64."""

import pytest
import torch
from cases import FAR

pytest.importorskip("triton")
from vps import reference
from vps.kernels import scores, tuning
from vps.kernels.prefill import factors, features

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def expected(values, mask, k):
    """Indices and energy; sums of small integers, as tests give, are exact in any order."""
    clean = values.double().cpu()
    clean = torch.where(clean.isfinite(), clean, 0.0)
    counted = torch.ones(values.shape[:2]) if mask is None else mask.double().cpu()
    clean = clean * counted[..., None]
    elements = counted.sum(1).clamp(min=1) * values.shape[2]
    selected = torch.stack([reference.top_k(row, k) for row in clean.abs().sum(1)])
    return selected, clean.square().sum((1, 2)) / elements


def check(values, mask, k):
    wanted, mean = expected(values, mask, k)
    for asked in (False, True):
        selected, energy = features.launch(values, mask, k, asked)
        assert selected.dtype == torch.int64 and torch.equal(selected.cpu(), wanted)
        assert energy.dtype == scores.accumulation(values.dtype)[0]
        assert energy.shape == (len(values) if asked else 0,)
    accuracy = 1e-14 if values.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(energy.double().cpu(), mean, rtol=accuracy, atol=0)


def integers(*shape, dtype, device):
    """Values whose sums are exact, with many ties."""
    return torch.randint(-9, 10, shape, device=device).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, k",
    [((1, 1, 1), 1), ((5, 1, 33), 4), ((2, 7, 8), 8), ((3, 65, 70), 64), ((1, 200, 2100), 4)],
)
def test_features(device, dtype, shape, k):
    values = integers(*shape, dtype=dtype, device=device)
    check(values, None, k)
    mask = torch.rand(shape[:2], device=device) < 0.6
    mask[0] = False
    check(values, mask, k)


@pytest.mark.parametrize("tokens, width, k", [(64, 5000, 3), (640, 520, 8), (1100, 300, 2)])
def test_one_tile_and_many(device, tokens, width, k):
    """Many splits of few columns, few of many: what a program holds is the same."""
    tile = tuning.rank(width, k)
    assert tile["BLOCK_S"] * tile["BLOCK_D"] <= 4096
    values = integers(2, tokens, width, dtype=torch.float32, device=device)
    values[0, :, -1] = 9  # the best comes last
    check(values, None, k)


def test_records_of_all_tiles_fit_one_program():
    for width in (1, 3584, 28_672, 262_144):
        for k in (1, 4, 64):
            tile = tuning.rank(width, k)
            assert tuning.steps(width, tile["BLOCK_D"]) * k <= factors.LARGEST_RECORDS
            assert tile["BLOCK_D"] >= min(k, width)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_counts_zero(device, dtype):
    values = integers(2, 70, 9, dtype=dtype, device=device)
    values[0, 3, 2] = float("nan")
    values[0, 66] = float("inf")
    values[1, 0, 0] = -float("inf")
    values[1, :, 5] = float("nan")
    check(values, None, 8)


def test_strides(device):
    values = integers(40, 3, 22, dtype=torch.float32, device=device)
    for view in (values.transpose(0, 1), values.permute(2, 0, 1), values[:, :, ::3]):
        check(view, None, 2)
    mask = torch.rand(3, 40, device=device) < 0.5
    check(values, mask.T, 4)
    check(values.transpose(0, 1), mask, 4)


def test_beyond_2_31_elements(device, sparse):
    """Rows 2^30 + 1 elements apart, in a file of which four rows are ever touched."""
    width = 5
    values = sparse.as_strided((1, 4, width), (0, FAR, 1))
    values.copy_(integers(1, 4, width, dtype=torch.float16, device=device))
    check(values, None, 3)
    check(values.transpose(0, 1), None, 3)


@pytest.mark.parametrize("tokens, width", [(1, 4200), (200, 2100)])  # two tiles of columns
def test_a_group_does_not_depend_on_the_others(device, tokens, width):
    values = torch.randn(3, tokens, width, device=device)
    mask = torch.rand(3, tokens, device=device) < 0.8
    together = features.launch(values, mask, 4, True)
    again = features.launch(values, mask, 4, True)
    for group in range(3):
        one = slice(group, group + 1)
        alone = features.launch(values[one].clone(), mask[one], 4, True)
        for whole, repeated, single in zip(together, again, alone, strict=True):
            assert torch.equal(whole, repeated) and torch.equal(whole[one], single)


def test_nothing_to_sum(device):
    selected, energy = features.launch(torch.empty(0, 3, 4, device=device), None, 2, True)
    assert selected.shape == (0, 2) and energy.shape == (0,)
    selected, energy = features.launch(torch.empty(2, 0, 4, device=device), None, 2, True)
    assert selected.tolist() == [[0, 1]] * 2 and not energy.any()


def test_errors():
    values = torch.ones(2, 3, 4)
    with pytest.raises(TypeError, match="int64"):
        features.launch(values.long(), None, 1, True)
    with pytest.raises(ValueError, match=r"features: values must be \[G, T, d\]"):
        features.launch(values[0], None, 1, True)
    with pytest.raises(ValueError, match="features: mask must be bool"):
        features.launch(values, torch.ones(2, 4, dtype=torch.bool), 1, True)
    for k in (0, 5):
        with pytest.raises(ValueError, match="features: k must be from 1 to 4"):
            features.launch(values, None, k, True)
