"""Q/K coupling: the selection by its formula, its operator, and layers in a model."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from cases import HEADS, in_threads
from torch import nn

import vps
from vps import VPSConfig, reference
from vps.algorithm import coupling, policy
from vps.backends import operator
from vps.functional import Projection, coupled_vps_linear
from vps.layers import pairing

needs_cpp = pytest.mark.skipif(
    vps.backends()["cpp"] is not None, reason=f"no C++ backend: {vps.backends()['cpp']}"
)


@pytest.mark.parametrize("heads, kv_heads, size", HEADS)
def test_selection_by_the_formula(heads, kv_heads, size):
    """c[g, j] spelled out, on scores with many ties."""
    generator = torch.Generator().manual_seed(heads)
    s_q = torch.randint(0, 3, (2, heads * size), generator=generator).float()
    s_k = torch.randint(0, 3, (2, kv_heads * size), generator=generator).float()
    r = min(4, kv_heads * size)
    I_q, I_k = coupling.select(s_q, s_k, r, heads, kv_heads)
    per_group = heads // kv_heads
    for group in range(2):
        ranked = []
        for g in range(kv_heads):
            for j in range(size):
                own = [
                    float(s_q[group, h * size + j])
                    for h in range(g * per_group, (g + 1) * per_group)
                ]
                best = g * per_group + own.index(max(own))
                c = sum(own) * float(s_k[group, g * size + j])
                ranked.append((-c, g * size + j, best * size + j))
        ranked.sort()
        assert I_k[group].tolist() == [k for _, k, _ in ranked[:r]]
        assert I_q[group].tolist() == [q for _, _, q in ranked[:r]]


@pytest.mark.parametrize("given", [False, True])
def test_opcheck(given):
    torch.manual_seed(0)
    x, W_q, W_k = torch.randn(2, 5, 12), torch.randn(16, 12), torch.randn(8, 12)
    I_in = torch.tensor([[3, 1, 7, 0]] * 2) if given else None
    mask = torch.rand(2, 5) < 0.7
    arguments = (x, W_q, W_k, mask, I_in, 4, 4, 2)
    torch.library.opcheck(torch.ops.vps.couple.default, arguments)
    for ours, theirs in zip(operator.couple(*arguments), coupling.couple(*arguments), strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_cpp
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (2, 5)])
def test_both_layers_in_one_call_are_those_of_two(shape):
    torch.manual_seed(0)
    x, W_q, W_k = torch.randn(*shape, 12), torch.randn(16, 12), torch.randn(8, 12)
    b_q, mask = torch.randn(16), torch.rand(shape) < 0.7
    for config in (VPSConfig(), VPSConfig(builder="sc", order=2, clamp=0.1, clip="spectral")):
        numbers = torch.tensor(policy.bounds(config, 1.3), dtype=torch.float64)
        settings = policy.settings(config, False, 12, 8).packed()
        arguments = (x, W_q, b_q, W_k, None, mask, None, numbers, None, 4, 2, *settings)
        torch.library.opcheck(torch.ops.vps.linear_pair.default, arguments)
        with vps.backend("cpp"):
            pair = Projection(W_q, b_q), Projection(W_k)
            together = coupled_vps_linear(x, *pair, 4, 2, config, mask=mask)
            leaf = x.clone().requires_grad_()  # for whose gradient each is an operator by itself
            apart = coupled_vps_linear(leaf, *pair, 4, 2, config, mask=mask)
            assert all(y.requires_grad for y in apart)
        for one, other in zip(together, apart, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-6, atol=1e-6)


@needs_cpp
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"r": 9}, "r must be from 1 to .* 8"),
        ({"heads": 3}, "heads must be a multiple of kv_heads"),
        ({"kv_heads": 3}, "kv_heads must divide"),
        ({"kv_heads": 0}, "kv_heads must divide"),
        ({"W_k": torch.randn(8, 11)}, "x must have shape"),
        ({"W_q": torch.randn(16, 12).double()}, "W_q must be float32"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask must have shape"),
        ({"I_in": torch.full((2, 4), 12)}, "I_in must hold features from 0 to 11"),
    ],
)
def test_errors_of_the_operator_name_the_argument(changes, message):
    given = dict(
        x=torch.randn(2, 5, 12), W_q=torch.randn(16, 12), W_k=torch.randn(8, 12), mask=None,
        I_in=None, r=4, heads=4, kv_heads=2,
    ) | changes  # fmt: skip
    with pytest.raises((ValueError, RuntimeError), match=f"vps::couple: {message}"):  # by torch
        torch.ops.vps.couple(*given.values())


def test_head_counts_that_do_not_fit_are_named():
    x, q, k = torch.randn(3, 6), Projection(torch.randn(8, 6)), Projection(torch.randn(6, 6))
    with pytest.raises(ValueError, match="8 in 2 and 6 in 1"):
        coupled_vps_linear(x, q, k, 2, 1)
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        coupled_vps_linear(x, q, k, 1, 2)


# Layers of a model.


class Block(nn.Module):
    """What an attention block does with its projections."""

    def __init__(self):
        super().__init__()
        self.head_dim = 4
        self.q_proj, self.k_proj = nn.Linear(12, 16), nn.Linear(12, 8)
        self.between = lambda x: x

    def forward(self, x):
        q = self.q_proj(x)
        return q, self.k_proj(self.between(x))


@pytest.fixture
def block():
    torch.manual_seed(0)
    model = nn.Sequential(Block()).requires_grad_(False)
    report = vps.patch(model)
    assert report.coupled == ("0",) and "1 attention blocks" in str(report)
    return model


@pytest.fixture
def calls(monkeypatch):
    """Counts joint computations."""
    seen = []

    def counting(self, layer, x):
        seen.append(x)
        return outputs(self, layer, x)

    outputs = pairing.Coupling.outputs
    monkeypatch.setattr(pairing.Coupling, "outputs", counting)
    return seen


def expected_of(model, x):
    q, k = model[0].q_proj, model[0].k_proj
    results = reference.coupled_vps_linear(
        x, reference.Projection(q.weight, q.bias), reference.Projection(k.weight, k.bias),
        heads=4, kv_heads=2, config=VPSConfig(),
    )  # fmt: skip
    return [result.y for result in results]


def test_both_are_computed_once_and_nothing_waits_after(block, calls):
    x = torch.randn(2, 5, 12)
    ys = block(x)
    assert len(calls) == 1
    for y, expected in zip(ys, expected_of(block, x), strict=True):
        torch.testing.assert_close(y, expected)
    calls.clear()
    alive = [weakref.ref(tensor) for tensor in (x, *ys)]
    del x, ys, y, expected
    gc.collect()
    assert all(dead() is None for dead in alive)


def test_an_x_that_changed_between_them_is_computed_anew(block, calls):
    x = torch.randn(2, 5, 12)
    block[0].between = lambda x: x.mul_(2)
    _, k = block(x)
    assert len(calls) == 2
    torch.testing.assert_close(k, expected_of(block, x)[1])
    block[0].between = lambda x: x.clone()
    block(x)
    assert len(calls) == 4


def test_layers_outside_their_block_agree_and_nothing_waits(block):
    x = torch.randn(2, 5, 12)
    for layer, expected in zip(
        (block[0].k_proj, block[0].q_proj), reversed(expected_of(block, x)), strict=True
    ):
        torch.testing.assert_close(layer(x), expected)
        assert pairing._WAITING.y is None


def test_an_error_in_the_block_leaves_nothing(block):
    def fail(x):
        raise KeyError("between")

    block[0].between = fail
    with pytest.raises(KeyError):
        block(torch.randn(2, 5, 12))
    assert pairing._WAITING.y is None and pairing._WAITING.pair is None


def test_disabled_and_uncoupled(block, calls):
    x = torch.randn(2, 5, 12)
    with vps.disabled(block):
        assert torch.equal(block(x)[0], nn.functional.linear(x, *block[0].q_proj.parameters()))
    vps.set_config(block, VPSConfig(qk_coupling=False))
    alone = vps.vps_linear(x, *block[0].q_proj.parameters())
    torch.testing.assert_close(block(x)[0], alone)
    vps.set_config(block, VPSConfig(builder="random"))
    block(x)
    assert calls == []


def test_copies_couple_among_themselves(block, calls):
    x = torch.randn(2, 5, 12)
    block[0].between = None
    copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block))]
    for model in (block, *copies):
        model[0].between = torch.nn.Identity()
    for other in copies:
        assert other[0].q_proj.coupling.key is other[0].k_proj
        other[0].k_proj.weight.data.mul_(-3)
        torch.testing.assert_close(other(x)[0], expected_of(other, x)[0])
    assert list(block.state_dict()) == list(copies[0].state_dict())


def test_unpatch_leaves_no_trace(block):
    vps.patch(block)  # again
    assert len(block[0]._forward_pre_hooks) == 1
    vps.unpatch(block)
    assert not block[0]._forward_pre_hooks and not block[0]._forward_hooks
    assert not hasattr(block[0].q_proj, "coupling")


def test_two_threads_keep_their_own(block):
    xs = [torch.randn(2, 5, 12) for _ in range(2)]
    expected = [[y.clone() for y in block(x)] for x in xs]

    def same(index):
        return all(map(torch.equal, block(xs[index]), expected[index]))

    assert in_threads(lambda index: all(same(index) for _ in range(50)), range(2))


@pytest.mark.skipif(vps.backends()["triton"] is not None, reason="triton cannot run here")
@torch.no_grad()
def test_triton_takes_a_key_wider_than_its_kernel(monkeypatch):
    from vps.kernels.decode import couple

    torch.manual_seed(0)
    W_q, W_k = torch.randn(16, 12), torch.randn(8, 12)
    for tokens in (1, 5):
        x = torch.randn(2, tokens, 12)
        with vps.backend("triton"):
            whole = coupled_vps_linear(x, Projection(W_q), Projection(W_k), 4, 2)
            with monkeypatch.context() as patch:
                patch.setattr(couple, "LARGEST_WIDTH", 7)
                patch.setattr(couple, "couple_kernel", None)
                apart = coupled_vps_linear(x, Projection(W_q), Projection(W_k), 4, 2)
        for one, other in zip(whole, apart, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_blocks_that_stay_uncoupled_are_reported():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder_attn = Block()
            self.lone = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
            self.headless = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4)})

    report = vps.patch(Cross())
    assert not report.coupled
    assert "another input" in report.not_patched["encoder_attn"]
    assert "k_proj is not a sharpened" in report.not_patched["lone"]
    assert "how many heads" in report.not_patched["headless"]
    report = vps.patch(
        nn.ModuleDict({"qkv_proj": nn.Linear(4, 12)}), VPSConfig(target_modules="qkv_proj")
    )
    assert "no block has separate" in report.not_patched["qk_coupling"]
