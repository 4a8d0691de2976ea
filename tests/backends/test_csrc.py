"""The C++ operator against the reference in float64; threads and instruction sets."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from csrc_cases import DTYPES, NAMES, call, make
from processes import python

import vps
from vps import VPSConfig, reference
from vps.algorithm.policy import LayerGamma
from vps.backends import cpp
from vps.functional import Projection, sharpen

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    cpp.why_missing() is not None,
    reason=f"no C++ backend: {cpp.why_missing()}",
)


def scores(values, mask):
    """Sums of |values| in float64, non-finite elements and uncounted tokens 0; ``[G, d]``."""
    size = reference.clean(values.double()).abs()
    return (size if mask is None else size * mask.unsqueeze(-1)).sum(1)


def expected(monkeypatch, data, config, got, mask=None, entropy=None, outcomes=(), gradient=False):
    """y in float64 by the reference, each group with the features that the operator chose."""
    groups = []
    for g in range(len(data.x)):
        chosen = list(got.features[g])
        monkeypatch.setattr(reference, "top_k", lambda scores, k, c=chosen: c.pop(0))
        groups.append(
            reference.vps_linear(
                data.x[g].double(),
                data.W.double(),
                None if data.b is None else data.b.double(),
                config=config,
                mask=None if mask is None else mask[g],
                entropy=entropy,
                outcomes=outcomes,
                gradient=gradient,
            )
        )
    monkeypatch.undo()
    for g, result in enumerate(groups):
        (group,) = result.groups
        torch.testing.assert_close(
            got.gamma[g].double(), torch.tensor(group.gamma).double(), rtol=1e-3, atol=1e-6
        )
        active = got.core[g].abs().amax(1).nonzero().numel()
        assert active <= group.rank, (active, group.rank)
    return torch.stack([result.y for result in groups])


def check(monkeypatch, data, config, **options):
    """Values within the tolerance of the dtype, and features exactly those of the rounded H."""
    got = call(data, config, **options)
    want = expected(monkeypatch, data, config, got, **options)
    base = F.linear(data.x.double(), data.W.double(), None if data.b is None else data.b.double())
    own = (F.linear(data.x, data.W, data.b).double() - base).abs()
    error = (got.y.double() - want).abs()
    if data.x.dtype == torch.float32:
        assert error.max() <= 1e-6 * want.abs().max(), (error.max(), want.abs().max())
    else:
        own, error = own.norm() / base.norm(), error.norm() / want.norm()
        one_rounding = torch.finfo(data.x.dtype).eps / 2  # few elements can be luckier than that
        assert error <= max(2 * own, one_rounding), (error, own)
    if config.builder != "random":
        mask = options.get("mask")
        # The operator adds the bias in place; H is y with no bias and γ → 0.
        plain = VPSConfig(adaptive_gamma=False, gamma=1e-38, adaptive_rank=False, rank=1)
        H = call(SimpleNamespace(x=data.x, W=data.W, b=None), plain).y
        r = got.features.shape[-1]
        for side, values in enumerate((data.x, H)):
            best = scores(values, mask).sort(descending=True, stable=True).indices[:, :r]
            assert torch.equal(got.features[:, side], best)
    return got


BRANCHES = {
    "sk": {},
    "fixed": {"adaptive_rank": False, "adaptive_gamma": False},
    "rank 1": {"rank": 1, "adaptive_rank": False},
    "topk": {"adaptive_topk": True, "topk_bounds": (1, 3)},
    "no clip": {"tau": None},
    "tight": {"tau": 0.01},
    "spectral": {"clip": "spectral", "tau": 0.2},
    "clamp": {"clamp": 0.05},
    "order 2": {"order": 2},
    "adaptive order": {"adaptive_order": True},
    "sc": {"builder": "sc"},
    "sc, no clip": {"builder": "sc", "tau": None},
    "sc, spectral, order 2": {"builder": "sc", "clip": "spectral", "order": 2, "tau": 0.1},
    "sc, order 2, clamp": {"builder": "sc", "order": 2, "clamp": 0.05},
}


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=NAMES[1:])
def test_output_is_rounded_once_to_nearest_even(dtype):
    """Small integers keep every sum exact in float32, so that the last rounding alone is seen."""
    generator = torch.Generator().manual_seed(0)
    x, W = (
        torch.randint(-3, 4, size, generator=generator).to(dtype) for size in ((1, 8, 40), (90, 40))
    )
    config = VPSConfig(rank=4, adaptive_rank=False, gamma=2**-9, adaptive_gamma=False, tau=None)
    got = call(SimpleNamespace(x=x, W=W, b=None), config)
    want = reference.vps_linear(x.double(), W.double(), None, config=config).y
    assert (want.to(dtype).double() != want).float().mean() > 0.2
    ties = want.float().view(torch.int32) & 0xFFFF == 0x8000
    assert dtype != torch.bfloat16 or ties.any()
    assert torch.equal(got.y, want.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("tokens", [(1, 1), (1, 3), (4, 1), (1, 7), (3, 5)], ids=str)
@pytest.mark.parametrize("branch", BRANCHES)
def test_values_and_features(monkeypatch, branch, tokens, dtype):
    G, T = tokens
    got = check(monkeypatch, make(G, T, dtype=dtype), VPSConfig(**BRANCHES[branch]))
    assert got.y.dtype == dtype and got.y.shape == (G, T, 67)
    assert got.core.dtype == got.gamma.dtype == torch.float32
    clamped = "clamp" in branch
    assert got.t.shape == ((G, T, got.core.shape[1]) if clamped else (0,))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 1, 700), (3, 700, 1), (9, 64, 1100), (300, 33, 40)]
)
def test_shapes(monkeypatch, shape, dtype):
    T, d_in, d_out = shape
    check(monkeypatch, make(1, T, d_in, d_out, dtype, bias=False), VPSConfig())


@pytest.mark.parametrize("r", [8, 33, 64])
@pytest.mark.parametrize("T", [1, 5, 200])
@pytest.mark.parametrize("builder", ["sk", "sc"])
def test_large_rank(monkeypatch, r, T, builder):
    config = VPSConfig(
        rank=r, topk=64, adaptive_rank=False, builder=builder, clip="spectral", tau=0.3
    )
    check(monkeypatch, make(1, T, 130, 150), config)


def test_policy(monkeypatch):
    data = make(1, 6)
    data.W *= 0.1  # so that σ is not near 1
    config = VPSConfig(adaptive_topk=True, topk_bounds=(1, 4), adaptive_order=True)
    for options in (
        {},
        {"entropy": 0.9},
        {"entropy": 100.0},
        {"outcomes": (True, True)},
        {"outcomes": (False,) * 5, "entropy": 2.0},
        {"gradient": True},
    ):
        check(monkeypatch, data, config, **options)


@pytest.mark.parametrize("builder", ["sk", "sc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("tokens", [(3, 1), (4, 6)], ids=str)
def test_mask(monkeypatch, builder, dtype, tokens):
    data = make(*tokens, dtype=dtype)
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[0], mask[1] = True, False
    for b in (data.b, None):
        data.b = b
        got = check(monkeypatch, data, VPSConfig(builder=builder), mask=mask)
        assert got.gamma[1] == 0 and not got.core[1].any()
        assert torch.equal(got.y[1], F.linear(data.x, data.W, b)[1])
    alone = SimpleNamespace(x=data.x[:1], W=data.W, b=data.b)
    assert torch.equal(call(alone, VPSConfig(builder=builder)).features, got.features[:1])


def test_given_features(monkeypatch):
    data = make(2, 5)
    I_in, I_out = torch.tensor([[3, 1], [0, 44]]), torch.tensor([[66, 2], [0, 1]])
    config = VPSConfig(builder="random", adaptive_rank=False)
    strided = torch.stack([I_in, I_in + 1], -1)[..., 0]
    for options in ({"I_in": I_in, "I_out": I_out}, {"I_in": strided, "I_out": I_out}):
        got = call(data, config, **options)
        assert torch.equal(got.features, torch.stack([I_in, I_out], 1))
        config_sk = VPSConfig(builder="sk", adaptive_rank=False)
        want = expected(monkeypatch, data, config_sk, got)
        torch.testing.assert_close(got.y.double(), want, rtol=1e-6, atol=1e-6)
    given = call(data, VPSConfig(builder="sk", adaptive_rank=False), I_in=I_in)
    assert torch.equal(given.features[:, 0], I_in)
    want = expected(monkeypatch, data, VPSConfig(builder="sk", adaptive_rank=False), given)
    torch.testing.assert_close(given.y.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("way", ["x", "weight", "row gaps", "all"])
def test_strides(way, T, dtype):
    data = make(2, T, dtype=dtype)
    strided = SimpleNamespace(x=data.x, W=data.W, b=data.b)
    if way in ("x", "all"):
        strided.x = data.x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if way in ("weight", "all"):
        strided.W = data.W.t().contiguous().t()
    if way == "row gaps":
        strided.W = F.pad(data.W, (0, 5), value=float("nan"))[:, :-5]
    if way == "all":
        strided.b = torch.stack([data.b, data.b], 1)[:, 0]
    config = VPSConfig(builder="sc", clamp=0.1)
    got, want = call(strided, config), call(data, config)
    assert torch.equal(got.features, want.features)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(got.y, want.y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("T", [3, 6])
@pytest.mark.parametrize("builder", ["sk", "sc"])
def test_broken_token_stays_alone(dtype, T, builder):
    data = make(1, T, dtype=dtype)
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = SimpleNamespace(x=data.x.clone(), W=data.W, b=data.b)
        broken.x[0, 1] = value
        zeroed = SimpleNamespace(x=data.x.clone(), W=data.W, b=data.b)
        zeroed.x[0, 1] = 0
        for clamp in (None, 0.1):
            config = VPSConfig(builder=builder, clamp=clamp)
            got, want = call(broken, config), call(zeroed, config)
            rest = [n for n in range(T) if n != 1]
            assert torch.equal(got.features, want.features)
            torch.testing.assert_close(got.y[0, rest], want.y[0, rest])
            assert not got.y[0, 1].isfinite().any()


def test_ties_go_to_the_lower_index():
    data = make(1, 1, 70, 90)
    data.x = torch.ones_like(data.x)
    data.W = torch.ones_like(data.W)
    got = call(data, VPSConfig())
    assert got.features.tolist() == [[[0, 1, 2, 3], [0, 1, 2, 3]]]
    data.x[0, 0, [65, 20, 41]] = 2.0
    assert call(data, VPSConfig()).features[0, 0].tolist() == [20, 41, 65, 0]


@pytest.mark.parametrize("builder", ["sk", "sc"])
@pytest.mark.parametrize("T", [1, 8])
def test_zeros(builder, T):
    data = make(1, T)
    for zero in (data.x, data.W):
        zero.zero_()
        got = call(data, VPSConfig(builder=builder, order=2, clip="spectral"))
        assert torch.equal(got.y, data.b.expand_as(got.y))
        assert got.core.isfinite().all()


def test_weight_is_not_written_and_outputs_are_new():
    data = make(1, 3)
    before = [data.x.clone(), data.W.clone(), data.b.clone()]
    first, second = call(data, VPSConfig()), call(data, VPSConfig())
    assert all(map(torch.equal, before, (data.x, data.W, data.b)))
    assert first.y.data_ptr() != second.y.data_ptr()


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_extreme_scales(monkeypatch, scale):
    data = make(1, 6)
    data.x *= scale
    check(monkeypatch, data, VPSConfig(builder="sk", adaptive_rank=False))


CHILD = """
import sys, torch
sys.path[:0] = ["tests/backends", "tests"]
import csrc_cases as own
from vps import VPSConfig
threads = [int(n) for n in sys.argv[2].split(",")]
results = {}
for n in threads:
    torch.set_num_threads(n)
    for dtype in own.DTYPES:
        for G, T in ((1, 1), (4, 1), (1, 300), (300, 1), (3, 100)):
            data = own.make(G, T, 400, 1100, dtype)
            for builder in ("sk", "sc"):
                out = own.call(data, VPSConfig(builder=builder, clamp=0.2, clip="spectral"))
                key = str(dtype), G, T, builder
                results.setdefault(key, []).append(out)
                first = results[key][0]
                assert own.same(vars(first), vars(out)), (n, *key)
torch.save({k: v[0].y for k, v in results.items()}, sys.argv[1])
"""


def run_child(path, threads, **environment):
    run = python(CHILD, path, threads, **environment)
    assert run.returncode == 0, run.stderr
    return torch.load(path)


def test_threads_give_the_same_bits(tmp_path):
    run_child(tmp_path / "out", "1,2,8")


def test_instruction_sets_agree(tmp_path):
    best = run_child(tmp_path / "best", "2", VPS_CPP_ISA="")
    plain = run_child(tmp_path / "plain", "2", VPS_CPP_ISA="generic")
    for key, y in best.items():
        error = (plain[key].double() - y.double()).norm() / y.double().norm()
        assert error <= (1e-6 if "float32" in key[0] else 1e-2), (key, error)


def test_unknown_instruction_set():
    run = python(CHILD, os.devnull, "1", VPS_CPP_ISA="neon")
    assert "VPS_CPP_ISA must be avx512, avx2 or generic, got 'neon'" in run.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("tokens", [(1, 1), (2, 3), (1, 20)], ids=str)
@pytest.mark.parametrize("gamma", [torch.tensor(0.0), torch.zeros(4)], ids=["one", "columns"])
@torch.no_grad()
def test_gamma_0_in_a_tensor_keeps_the_bits_of_the_base(gamma, tokens, dtype):
    data = make(*tokens, dtype=dtype)
    layer = Projection(data.W, data.b, False, None, LayerGamma(gamma))
    with vps.backend("cpp"):
        (y,) = sharpen(data.x, (layer,), VPSConfig())
    assert torch.equal(y, F.linear(data.x, data.W, data.b))
