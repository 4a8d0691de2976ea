"""The short way for one group on a CPU against the general one of the torch backend."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from vps import VPSConfig
from vps.algorithm import coupling, policy, selection, torch_backend
from vps.algorithm.torch_backend import Inputs
from vps.backends import one_group

CONFIG = VPSConfig()


def call(x, W, config=CONFIG, factor=1.0, **given):
    """Inputs and settings of a call; ``given`` are further inputs by name."""
    numbers = torch.tensor(policy.bounds(config, factor), dtype=torch.float64)
    inputs = Inputs(x, W, None, None, None, None, numbers, None)._replace(**given)
    return inputs, policy.settings(config, False, W.shape[1], W.shape[0])


def both(inputs, settings):
    """The short way's output and ``I_in``, and the general one's."""
    short = one_group.sharpen(inputs, settings)
    assert short is not None, "the call was expected to take the short way"
    return short, torch_backend.forward(inputs, settings)[:2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("shape", [(3, 2), (17, 40), (64, 64)])
def test_agrees_with_the_general_way(dtype, tokens, shape):
    torch.manual_seed(0)
    x, W = torch.randn(1, tokens, shape[1]).to(dtype), torch.randn(*shape).to(dtype)
    extras = {"bias": torch.randn(shape[0]).to(dtype), "entropy": torch.tensor(1.7)}
    for given in ({}, extras):
        for config in (CONFIG, VPSConfig(tau=None), CONFIG.replace(adaptive_gamma=False)):
            short, general = both(*call(x, W, config, factor=1.3, **given))
            assert torch.equal(short[1], general[1])
            error = (short[0] - general[0]).double().norm() / general[0].double().norm()
            assert error <= 4 * torch.finfo(dtype).eps


def pair(x, W_q, W_k, **given):
    """A query's inputs, a key's, and their settings; ``given`` are further inputs of both."""
    query, settings = call(x, W_q, **given)
    return query, query._replace(weight=W_k), settings


def general_pair(query, key, settings, heads, kv_heads):
    """What the general way makes of a query and a key, and the selections."""
    joint = coupling.couple(
        query.x, query.weight, key.weight, None, query.I_in, settings.r, heads, kv_heads
    )
    I_in = joint.features[:, 0]
    ys = [
        torch_backend.forward(
            own._replace(I_in=I_in, I_out=joint.features[:, i + 1], energy=joint.energy), settings
        ).y
        for i, own in enumerate((query, key))
    ]
    return *ys, I_in


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
def test_a_pair_agrees_with_the_general_way(dtype, tokens, heads):
    torch.manual_seed(heads[0])
    x = torch.randn(1, tokens, 24).to(dtype)
    W_q, W_k = (torch.randn(8 * count, 24).to(dtype) for count in heads)
    for I_in in (None, torch.tensor([[3, 1, 20, 7]])):
        query, key, settings = pair(x, W_q, W_k, I_in=I_in)
        query = query._replace(bias=torch.randn(len(W_q)).to(dtype))
        key = key._replace(policy=key.policy * 0.9)
        short = one_group.sharpen_pair(query, key, settings, *heads)
        assert short is not None
        general = general_pair(query, key, settings, *heads)
        assert torch.equal(short[2], general[2])
        for y, expected in zip(short[:2], general[:2], strict=True):
            error = (y - expected).double().norm() / expected.double().norm()
            assert error <= 4 * torch.finfo(dtype).eps


def test_query_heads_that_tie_go_to_the_first():
    x, W_k = torch.randn(1, 1, 12), torch.randn(8, 12)
    W_q = torch.cat([0.5 * W_k, W_k, -W_k])  # three heads for one key head
    s_q, s_k = ((x @ W.T).abs().view(-1) for W in (W_q, W_k))
    found = one_group._joint(s_q, s_k, 3, 3, 1)
    assert found is not None
    assert torch.equal(found[0], found[1] + 8)
    general = coupling.select(s_q[None], s_k[None], 3, 3, 1)
    assert torch.equal(torch.stack(found), torch.cat(general))


def test_what_is_no_pair_for_the_short_way():
    x, W = torch.randn(1, 2, 8), torch.randn(8, 8)
    others = [
        pair(x.expand(3, -1, -1), W, W),
        pair(x, W, W, mask=torch.ones(1, 2, dtype=torch.bool)),
        pair(x * 1e30, W, W),
        pair(x, W, W.clone().requires_grad_()),
    ]
    for query, key, settings in others:
        assert one_group.sharpen_pair(query, key, settings, 2, 2) is None
    query, key, settings = pair(x, W, W)
    assert one_group.sharpen_pair(query, key, settings._replace(coupled=True), 2, 2) is None
    assert one_group.sharpen_pair(query, key, settings, 2, 2) is not None


@pytest.mark.parametrize("d_out", [1024, 1023])
def test_the_product_of_one_token_by_blocks(d_out):
    x, W = torch.randn(1, 1, 600), torch.randn(d_out, 600)
    assert W.numel() >= one_group.SPLIT
    expected = F.linear(x.double(), W.double())
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4):  # 1023 is a multiple of 1 and 3 alone
            torch.set_num_threads(count)
            for weight in (W, W.t().contiguous().t()):
                H = one_group._product(x, weight)
                error = (H.double() - expected).norm() / expected.norm()
                assert H.shape == (1, 1, d_out) and error < 1e-6
    finally:
        torch.set_num_threads(threads)


def test_a_known_base_product_stays_as_it_is():
    for tokens in (1, 4):
        x, W = torch.randn(1, tokens, 8), torch.randn(6, 8)
        H = x @ W.T
        before = H.clone()
        short, general = both(*call(x, W, H=H, energy=torch.tensor([0.4])))
        assert torch.equal(H, before)
        torch.testing.assert_close(short[0], general[0])


@pytest.mark.parametrize("tokens", [1, 3])
def test_ties_go_to_the_lower_index(tokens):
    x = torch.ones(1, tokens, 9)
    x[..., 5] = -1
    W = torch.eye(7, 9)
    short, general = both(*call(x, W))
    assert short[1].tolist() == [[0, 1, 2, 3]]
    torch.testing.assert_close(short[0], general[0], rtol=1e-6, atol=0)


def test_given_selections_are_used():
    x, W = torch.randn(1, 1, 8), torch.randn(6, 8)
    index = torch.tensor([[7, 1, 3, 2]])
    short, general = both(*call(x, W, I_in=index, I_out=torch.tensor([[5, 0, 2, 1]])))
    assert torch.equal(short[1], index)
    torch.testing.assert_close(short[0], general[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_statistics_that_are_not_finite_take_the_general_way(value):
    x, W = torch.randn(1, 2, 8), torch.randn(6, 8)
    x[0, 0, 3] = value
    assert one_group.sharpen(*call(x, W)) is None


@pytest.mark.parametrize(
    "config",
    [VPSConfig(clamp=0.1), VPSConfig(builder="sc"), VPSConfig(clip="spectral")],
    ids=["clamp", "sc", "spectral"],
)
def test_other_settings_take_the_general_way(config):
    assert one_group.sharpen(*call(torch.randn(1, 1, 8), torch.randn(6, 8), config)) is None


def test_groups_masks_gradients_and_tracers_take_the_general_way():
    x, W = torch.randn(1, 2, 8), torch.randn(6, 8)
    assert one_group.sharpen(*call(x.expand(2, -1, -1), W)) is None
    assert one_group.sharpen(*call(x, W, mask=torch.ones(1, 2, dtype=torch.bool))) is None
    assert one_group.sharpen(*call(x.clone().requires_grad_(), W)) is None
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in (x, W)]
        assert one_group.sharpen(*call(*fake)) is None
    seen = []
    torch.vmap(lambda row: seen.append(one_group.sharpen(*call(row, W))) or row)(x.unsqueeze(0))
    assert seen == [None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_energy_of_a_long_prompt_is_exact(dtype):
    values = torch.randn(1, 1024, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = values.double().square().mean().item()
    _, energy = selection.statistics(values, None, None, True)
    for found in (one_group._energy(values[0]), energy.item()):
        assert found == pytest.approx(expected, rel=2e-6)


def test_gamma_zero_keeps_the_bits_of_the_base_layer():
    x, W = torch.randn(1, 1, 1433), torch.randn(1100, 1433)
    b = torch.randn(1100)
    query, key, settings = pair(x, W, W.flip(0), bias=b)
    zero = query.policy.clone()
    zero[1:3] = 0
    query, key = query._replace(policy=zero), key._replace(policy=zero)
    y, _ = one_group.sharpen(query, settings)
    y_q, y_k, _ = one_group.sharpen_pair(query, key, settings, 2, 2)
    assert torch.equal(y, F.linear(x, W, b)) and torch.equal(y_q, y)
    assert torch.equal(y_k, F.linear(x, W.flip(0), b))
