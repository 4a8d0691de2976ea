"""Kernel of the joint selection of query and key against the definition in float64."""

import pytest
import torch
from cases import FAR

pytest.importorskip("triton")
from vps.algorithm import coupling
from vps.kernels.decode import couple

pytestmark = pytest.mark.usefixtures("poison")
SHAPES = [(4, 4, 8), (4, 2, 16), (8, 1, 5), (3, 3, 1), (14, 2, 64), (6, 2, 700)]


def projections(heads, kv_heads, size, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(heads * size)
    return tuple(
        torch.randn(3, number * size, generator=generator).to(device, dtype)
        for number in (heads, kv_heads)
    )


def features(r, device):
    """``I_in`` as a view whose rows lie apart."""
    return torch.arange(6 * r, device=device).view(3, 2, r)[:, 1]


def check(query, key, heads, kv_heads, r, found):
    s_q, s_k = (z.double().abs().nan_to_num(0.0, 0.0, 0.0) for z in (query, key))
    I_q, I_k = coupling.select(s_q.cpu(), s_k.cpu(), r, heads, kv_heads)
    assert torch.equal(found.cpu(), torch.stack([features(r, "cpu"), I_q, I_k], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, kv_heads, size", SHAPES)
def test_outputs_of_one_token(device, dtype, heads, kv_heads, size):
    query, key = projections(heads, kv_heads, size, device, dtype)
    query[1, 0], key[1, -1] = float("nan"), float("inf")
    for r in {1, min(4, key.shape[1]), min(64, key.shape[1])}:
        energy, found = couple.launch(query, key, [], None, features(r, device), heads, kv_heads)
        check(query, key, heads, kv_heads, r, found)
    squares = torch.cat([query, key], 1).double().nan_to_num(0.0, 0.0, 0.0).square()
    torch.testing.assert_close(energy.double(), squares.mean(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads, kv_heads, size", SHAPES)
def test_scores(device, dtype, heads, kv_heads, size):
    query, key = (z.abs() for z in projections(heads, kv_heads, size, device, dtype))
    for s_q, s_k in (
        (query, key),
        ((query * 2).round(), (key * 2).round()),  # ties of channels and of heads
        (query * 1e-30, key * 1e-30),  # float32 would lose their products
        (query * 0, key),
        (query.t().contiguous().t(), key[:, :, None].expand(-1, -1, 2)[..., 0]),
    ):
        energies = [torch.rand(3, device=device, dtype=dtype) for _ in range(2)]
        r = min(4, key.shape[1])
        energy, found = couple.launch(
            s_q, s_k, energies, None, features(r, device), heads, kv_heads
        )
        check(s_q, s_k, heads, kv_heads, r, found)
        d_q, d_k = s_q.shape[1], s_k.shape[1]
        pooled = (energies[0].double() * d_q + energies[1].double() * d_k) / (d_q + d_k)
        torch.testing.assert_close(energy.double(), pooled, rtol=1e-6, atol=0)


def test_a_token_that_does_not_count_has_no_energy(device):
    query, key = projections(4, 2, 8, device)
    counted = torch.tensor([[True, False], [False, True], [True, True]], device=device)[:, 0]
    energy, _ = couple.launch(query, key, [], counted, features(4, device), 4, 2)
    assert (energy > 0).tolist() == counted.tolist()


def test_the_widest_key(device):
    width = couple.LARGEST_WIDTH
    key = torch.rand(3, width, device=device)
    _, found = couple.launch(key, key, [], None, features(4, device), 64, 64)
    check(key, key, 64, 64, 4, found)


def test_beyond_2_31_elements(device, sparse):
    """Rows, or features, 2^30 + 1 elements apart, in a file of which few pages are ever touched."""
    given = [z[:, :4] for z in projections(4, 2, 2, device, torch.float16)]
    for strides in ((FAR, 1), (1, FAR)):
        far = sparse.as_strided((3, 4), strides)
        for number in range(2):
            far.copy_(given[number])
            both = [far if place == number else z for place, z in enumerate(given)]
            _, found = couple.launch(*both, [], None, features(4, device), 2, 2)
            check(*given, 2, 2, 4, found)


def test_nothing():
    energy, found = couple.launch(
        torch.empty(0, 8), torch.empty(0, 8), [], None, torch.empty(0, 2, dtype=torch.int64), 2, 2
    )
    assert energy.shape == (0,) and found.shape == (0, 3, 2)


def test_errors():
    query, key, I_in = torch.rand(3, 16), torch.rand(3, 8), features(2, "cpu")
    for match, *arguments in (
        ("must be \\[3, d\\] like I_in, got \\(2, 16\\)", query[:2], key, [], None, I_in, 4, 2),
        ("16 and 8 features are none of 4 and 3 heads", query, key, [], None, I_in, 4, 3),
        ("expected two energies", query, key, [torch.rand(3)], None, I_in, 4, 2),
        ("r must be from 1 to 8, got 9", query, key, [], None, features(9, "cpu"), 4, 2),
    ):
        with pytest.raises(ValueError, match=match):
            couple.launch(*arguments)
    assert "at most 8192 features" in couple.refusal(8193, 4)
