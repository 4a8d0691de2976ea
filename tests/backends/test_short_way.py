"""The short way for one group on a CPU against the general one of the torch backend."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from vps import VPSConfig
from vps.algorithm import coupling, flow, policy, selection
from vps.algorithm.flow import Given, Layer
from vps.algorithm.weight import Matrix
from vps.backends import torch_backend
from vps.backends.call import Call

CONFIG = VPSConfig()


def call(x, *weights, config=CONFIG, factor=1.0, biases=(None, None), heads=None, **given):
    """A call of one layer, or of a query and a key; ``given`` are what else a call has."""
    numbers = torch.tensor(policy.bounds(config, factor), dtype=torch.float64)
    d_out, d_in = weights[-1].shape
    settings = policy.settings(config, False, d_in, d_out)
    layers = [Layer(Matrix(W), b, settings, numbers) for W, b in zip(weights, biases, strict=False)]
    return Call(x, tuple(layers), heads=heads, **given)


def short(given):
    """What the short way gives, or ``None`` where it is not taken."""
    if not torch_backend._is_short(given):
        return None
    with torch_backend.untracked():
        if given.heads is None:
            return torch_backend._one(given)
        return torch_backend._pair(given, given.heads)


def general(given):
    """What the flow gives."""
    outcomes, I_in = flow.sharpen(*given[:6])
    return [outcome.y for outcome in outcomes], I_in


def agree(given, eps):
    found, expected = short(given), general(given)
    assert found is not None, "the call was expected to take the short way"
    assert torch.equal(found[1], expected[1])
    for y, other in zip(found[0], expected[0], strict=True):
        assert (y - other).double().norm() / other.double().norm() <= 4 * eps
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("shape", [(3, 2), (17, 40), (64, 64)])
def test_agrees_with_the_general_way(dtype, tokens, shape):
    torch.manual_seed(0)
    x, W = torch.randn(1, tokens, shape[1]).to(dtype), torch.randn(*shape).to(dtype)
    extras = {
        "biases": [torch.randn(shape[0]).to(dtype)],
        "entropy": torch.tensor([1.7, 1.3]).double(),
    }
    for given in ({}, extras):
        for config in (CONFIG, VPSConfig(tau=None), CONFIG.replace(adaptive_gamma=False)):
            agree(call(x, W, config=config, factor=1.3, **given), torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
def test_a_pair_agrees_with_the_general_way(dtype, tokens, heads):
    torch.manual_seed(heads[0])
    x = torch.randn(1, tokens, 24).to(dtype)
    both = [torch.randn(8 * count, 24).to(dtype) for count in heads]
    for I_in in (None, torch.tensor([[3, 1, 20, 7]])):
        biases = torch.randn(len(both[0])).to(dtype), None
        given = call(x, *both, biases=biases, heads=heads, given=Given(I_in))
        query, key = given.layers
        given = given._replace(layers=(query, key._replace(numbers=key.numbers * 0.9)))
        agree(given, torch.finfo(dtype).eps)
        plain = given._replace(layers=(query._replace(is_plain=True), given.layers[1]))
        assert short(plain)[0][0] is None


def test_query_heads_that_tie_go_to_the_first():
    x, W_k = torch.randn(1, 1, 12), torch.randn(8, 12)
    W_q = torch.cat([0.5 * W_k, W_k, -W_k])  # three heads for one key head
    s_q, s_k = ((x @ W.T).abs().view(-1) for W in (W_q, W_k))
    found = torch_backend._joint(s_q, s_k, 3, 3, 1)
    assert found is not None
    assert torch.equal(found[0], found[1] + 8)
    general = coupling.select(s_q[None], s_k[None], 3, 3, 1)
    assert torch.equal(torch.stack(found), torch.cat(general))


def test_what_is_no_pair_for_the_short_way():
    x, W, heads = torch.randn(1, 2, 8), torch.randn(8, 8), (2, 2)
    others = [
        call(x.expand(3, -1, -1), W, W, heads=heads),
        call(x, W, W, heads=heads, mask=torch.ones(1, 2, dtype=torch.bool)),
        call(x * 1e30, W, W, heads=heads),
        call(x, W, W.clone().requires_grad_(), heads=heads),
        call(x, W, W, heads=heads, config=VPSConfig(builder="sc")),
    ]
    assert [short(other) for other in others] == [None] * 5
    assert short(call(x, W, W, heads=heads)) is not None


@pytest.mark.parametrize("d_out", [1024, 1023])
def test_the_product_of_one_token_by_blocks(d_out):
    x, W = torch.randn(1, 1, 600), torch.randn(d_out, 600)
    assert W.numel() >= torch_backend.SPLIT
    expected = F.linear(x.double(), W.double())
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4):  # 1023 is a multiple of 1 and 3 alone
            torch.set_num_threads(count)
            for weight in (W, W.t().contiguous().t()):
                H = torch_backend._product(x, weight)
                error = (H.double() - expected).norm() / expected.norm()
                assert H.shape == (1, 1, d_out) and error < 1e-6
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("tokens", [1, 3])
def test_ties_go_to_the_lower_index(tokens):
    x = torch.ones(1, tokens, 9)
    x[..., 5] = -1
    W = torch.eye(7, 9)
    _, I_in = agree(call(x, W), torch.finfo(x.dtype).eps)
    assert I_in.tolist() == [[0, 1, 2, 3]]


def test_given_selections_are_used():
    x, W = torch.randn(1, 1, 8), torch.randn(6, 8)
    index = torch.tensor([[7, 1, 3, 2]])
    given = Given(index, torch.tensor([[5, 0, 2, 1]]), torch.tensor([0.4]))
    _, I_in = agree(call(x, W, given=given), torch.finfo(x.dtype).eps)
    assert torch.equal(I_in, index)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_statistics_that_are_not_finite_take_the_general_way(value):
    x, W = torch.randn(1, 2, 8), torch.randn(6, 8)
    x[0, 0, 3] = value
    assert short(call(x, W)) is None


@pytest.mark.parametrize(
    "config",
    [VPSConfig(clamp=0.1), VPSConfig(builder="sc"), VPSConfig(clip="spectral")],
    ids=["clamp", "sc", "spectral"],
)
def test_other_settings_take_the_general_way(config):
    assert short(call(torch.randn(1, 1, 8), torch.randn(6, 8), config=config)) is None


def test_groups_masks_gradients_and_tracers_take_the_general_way():
    x, W = torch.randn(1, 2, 8), torch.randn(6, 8)
    assert short(call(x.expand(2, -1, -1), W)) is None
    assert short(call(x, W, mask=torch.ones(1, 2, dtype=torch.bool))) is None
    assert short(call(x.clone().requires_grad_(), W)) is None
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in (x, W)]
        assert short(call(*fake)) is None
    seen = []
    torch.vmap(lambda row: seen.append(short(call(row, W))) or row)(x.unsqueeze(0))
    assert seen == [None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_energy_of_a_long_prompt_is_exact(dtype):
    values = torch.randn(1, 1024, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = values.double().square().mean().item()
    _, energy = selection.statistics(values, None, None, True)
    for found in (torch_backend._energy(values[0]), energy.item()):
        assert found == pytest.approx(expected, rel=2e-6)


def test_gamma_zero_keeps_the_bits_of_the_base_layer():
    x, W = torch.randn(1, 1, 1433), torch.randn(1100, 1433)
    b = torch.randn(1100)
    one = call(x, W, biases=[b])
    both = call(x, W, W.flip(0), biases=[b, b], heads=(2, 2))
    for given in (one, both):
        for layer in given.layers:
            layer.numbers[1:3] = 0
    (y,), _ = short(one)
    (y_q, y_k), _ = short(both)
    assert torch.equal(y, F.linear(x, W, b)) and torch.equal(y_q, y)
    assert torch.equal(y_k, F.linear(x, W.flip(0), b))
