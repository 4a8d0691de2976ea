"""Kernel of policy, norms and clip against the reference in float64."""

import pytest
import torch
from cases import FAR

pytest.importorskip("triton")
from vps import PolicyState, VPSConfig, reference
from vps.kernels import columns
from vps.kernels.prefill import factors

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
POLICY = [1.0, 0.3, 0.8, 1, 4, 16, 64, 1, 1]


def selections(groups, r, d_in, d_out, device):
    def drawn(d):
        return torch.stack([torch.randperm(d, device=device)[:r] for _ in range(groups)])

    return drawn(d_in), drawn(d_out)


def numbers(device, values=POLICY):
    return torch.tensor(values, dtype=torch.float64, device=device)


def expected_core(W, I_in, I_out, active, tau):
    W, (groups, r) = W.double().cpu(), I_in.shape
    core = torch.zeros(groups, r, r, dtype=torch.float64)
    for g in range(groups):
        n = int(active[g])
        A, B = W[I_out[g, :n].cpu()].T, W[:, I_in[g, :n].cpu()]
        core[g, range(n), range(n)] = 1 / reference.clip_scale(A, B, tau, "component")
    return core


def run(W, I_in, I_out, *others):
    return factors.launch(W, columns.launch(W, I_in), I_out, None, *others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "d_in, d_out, groups, r", [(1, 1, 1, 1), (9, 2100, 2, 8), (2100, 33, 1, 3), (20, 5, 6, 4)]
)
def test_factors(device, dtype, d_in, d_out, groups, r):
    """The last shape asks for more columns than W has, which then is transposed."""
    W = torch.randn(d_out, d_in, device=device).to(dtype)
    I_in, I_out = selections(groups, r, d_in, d_out, device)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    energy = torch.rand(groups, device=device, dtype=accumulate)
    policy, scale = numbers(device), float(W.double().norm()) / 5
    selected, core, gamma, active = run(W, I_in, I_out, policy, energy, None, scale, None)
    assert torch.equal(selected, torch.stack([I_in, I_out], 1))
    decisions = [reference.decide(VPSConfig(), float(E), None, ()) for E in energy]
    accuracy = 1e-12 if dtype == torch.float64 else 3e-6
    assert active.tolist() == [min(r, decision[1]) for decision in decisions]
    assert core.dtype == gamma.dtype == accumulate
    strength = torch.tensor([decision[2] for decision in decisions], dtype=torch.float64)
    torch.testing.assert_close(gamma.double().cpu(), strength, rtol=accuracy / 10, atol=0)
    expected = expected_core(W, I_in, I_out, active, scale)
    torch.testing.assert_close(core.double().cpu(), expected, rtol=accuracy, atol=0)


@pytest.mark.parametrize("entropy", [None, 0.0, 0.9, 7.0])
@pytest.mark.parametrize("outcomes", [(), (True,), (False,) * 5])
def test_policy(device, entropy, outcomes):
    energy = torch.tensor([0.0, 1e-12, 0.02, 0.4, 2.0, 50.0, float("inf")], device=device)
    W = torch.ones(70, 70, device=device)
    I_in, I_out = selections(7, 9, 70, 70, device)
    config = VPSConfig(adaptive_topk=True, topk_bounds=(2, 6), rank_bounds=(1, 8))
    policy = numbers(device, [1.0, 0.3, 0.8, 1, 8, 2, 6, 1, 1])
    state = PolicyState()
    state.set_entropy(entropy)
    state.outcomes = outcomes
    signals = state.signals(W.device)
    _, core, gamma, active = run(W, I_in, I_out, policy, energy, signals, None, None)
    for g in range(7):
        _, rank, strength, topk, _ = reference.decide(config, float(energy[g]), entropy, outcomes)
        assert active[g] == min(rank, topk)
        assert float(gamma[g]) == pytest.approx(strength, abs=1e-7)
        assert torch.equal(core[g].cpu(), torch.diag((torch.arange(9) < min(rank, topk)).float()))


@pytest.mark.parametrize("tokens", [1, 7, 4100])
def test_fixed_settings_and_uncounted_groups(device, tokens):
    """The one token that counts is the last of its group, in a mask of any strides."""
    mask = torch.zeros(tokens, 3, dtype=torch.bool, device=device).T
    mask[0, -1] = mask[2, -1] = True
    W = torch.randn(12, 10, device=device)
    I_in, I_out = selections(3, 4, 10, 12, device)
    policy = numbers(device, [1.3, 0.65, 0.65, 2, 2, 32, 32, 1, 1])
    _, core, gamma, active = run(W, I_in, I_out, policy, None, None, 0.8, mask)
    assert active.tolist() == [2, 0, 2]
    torch.testing.assert_close(gamma.cpu(), torch.tensor([0.65, 0.0, 0.65]))
    assert not core[1].any()
    torch.testing.assert_close(core.double().cpu(), expected_core(W, I_in, I_out, active, 0.8))


def test_strides(device):
    W = torch.randn(30, 24, device=device)
    I_in, I_out = selections(2, 5, 24, 30, device)
    policy, energy = numbers(device), torch.ones(2, device=device)
    plain = run(W, I_in, I_out, policy, energy, None, 0.8, None)
    shared = I_in[:1].expand(2, 5)
    both = torch.stack([I_in, I_out], 1)
    for weight, left, right in (
        (W.T.contiguous().T, I_in, I_out),
        (W.repeat(1, 2)[:, :24], I_in, I_out.T.contiguous().T),
        (W, shared, I_out),
        (W, *both.unbind(1)),
    ):
        selected, core, _, active = run(weight, left, right, policy, energy, None, 0.8, None)
        assert torch.equal(selected, torch.stack([left, I_out], 1))
        expected = expected_core(weight, left, I_out, active, 0.8)
        torch.testing.assert_close(core.double().cpu(), expected, rtol=3e-6, atol=0)
    assert torch.equal(plain[3], active)


def test_a_group_does_not_depend_on_the_others(device):
    W = torch.randn(9, 1100, device=device)
    I_in, I_out = selections(5, 4, 1100, 9, device)
    policy, energy = numbers(device), torch.rand(5, device=device)
    together = run(W, I_in, I_out, policy, energy, None, 0.8, None)
    again = run(W, I_in, I_out, policy, energy, None, 0.8, None)
    for g in range(5):
        one = slice(g, g + 1)
        alone = run(W, I_in[one], I_out[one], policy, energy[one], None, 0.8, None)
        for whole, repeated, single in zip(together, again, alone, strict=True):
            assert torch.equal(whole, repeated) and torch.equal(whole[one], single)


def test_beyond_2_31_elements(device, sparse):
    weight = sparse.as_strided((4, 6), (FAR, 1))
    weight.copy_(torch.randn(4, 6))
    policy = numbers(device, [1.0, 0.5, 0.5, 2, 2, 32, 32, 1, 1])
    I_in, I_out = torch.tensor([[5, 0]]), torch.tensor([[3, 2]])
    for W in (weight, weight.T):
        left, right = (I_in, I_out) if W is weight else (I_out, I_in)
        for repeat in (1, 4):  # more columns than W has, in the end
            index = left.expand(repeat, 2), right.expand(repeat, 2)
            _, core, _, active = run(W, *index, policy, None, None, 0.1, None)
            expected = expected_core(W, *index, active, 0.1)
            torch.testing.assert_close(core.double(), expected, rtol=2e-6, atol=0)


def test_parts_of_a_ranking(device):
    """The best of several parts, of which some hold fewer than r; ties go to the lower index."""
    W = torch.randn(40, 12, device=device)
    index = torch.tensor([[[3, 9, 1], [17, 12, 2**31 - 1]], [[0, 4, 2], [11, 10, 13]]])
    record = torch.tensor([[[5.0, 4, 4], [5, 0, -1]], [[0, 0, 0], [7, 1, 0]]], device=device)
    I_in = torch.stack([torch.randperm(12, device=device)[:3] for _ in range(2)])
    policy = numbers(device, [1.0, 0.5, 0.5, 3, 3, 32, 32, 1, 1])
    best = torch.tensor([[3, 17, 1], [11, 10, 0]], device=device)
    found = factors.launch(
        W, columns.launch(W, I_in), index.int().to(device), record, policy, None, None, 0.8, None
    )
    for one, wanted in zip(found, run(W, I_in, best, policy, None, None, 0.8, None), strict=True):
        assert torch.equal(one, wanted)
    assert torch.equal(found[0][:, 1], best)


def test_errors():
    W, index = torch.ones(3, 4), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="I_out must be int64"):
        run(W, index, index.int(), numbers("cpu"), None, None, None, None)
    filled, parts = columns.launch(W, index), torch.zeros(1, 5, 2)
    for wrong in (index, parts.long(), parts[:, :4].int(), torch.zeros(1, 5, 3).int()):
        with pytest.raises(ValueError, match="beside a record"):
            factors.launch(W, filled, wrong, parts, numbers("cpu"), None, None, None, None)
    with pytest.raises(TypeError, match="policy must be float64"):
        run(W, index, index, torch.ones(9), None, None, None, None)
    for mask in (torch.ones(2, 3, dtype=torch.bool), torch.ones(1, 3)):
        with pytest.raises(ValueError, match=r"mask must be bool \[1, T\]"):
            run(W, index, index, numbers("cpu"), None, None, None, mask)
