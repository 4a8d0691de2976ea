"""The C++ backward pass against the formula of SPEC §6 in float64."""

import pytest
import torch
from csrc_cases import DTYPES

from vps.algorithm import gradient
from vps.backends import cpp

pytestmark = pytest.mark.skipif(
    cpp.why_missing() is not None,
    reason=f"no C++ backend: {cpp.why_missing()}",
)


def make(G, T, d_in, d_out, r, dtype=torch.float32, seed=0):
    """g, W, features [G, 2, r], core [G, r, r] and gamma [G]."""
    torch.manual_seed(seed)
    features = [torch.stack([torch.randperm(d)[:r] for _ in range(G)]) for d in (d_in, d_out)]
    return (
        torch.randn(G, T, d_out).to(dtype),
        (torch.randn(d_out, d_in) / d_out**0.5).to(dtype),
        torch.stack(features, 1),
        torch.randn(G, r, r),
        torch.rand(G),
    )


def expected(g, weight, features, core, gamma):
    """``∂L/∂x`` with every matrix written out, in float64."""
    g, W, core = g.double(), weight.double(), core.double()
    out = g @ W
    for i, (I_in, I_out) in enumerate(features):
        B = W[:, I_in]
        out[i] += gamma[i].double() * (g[i] @ B) @ core[i].mT @ W[I_out]
    return out


def close(got, right, dtype):
    error = (got.double() - right).norm() / right.norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "G, T, d_in, d_out, r",
    [
        (1, 1, 45, 67, 4),
        (1, 33, 67, 45, 1),
        (3, 17, 130, 61, 4),
        (2, 5, 16, 9, 9),
        (40, 1, 24, 24, 2),
    ],
)
def test_backward(G, T, d_in, d_out, r, dtype):
    data = make(G, T, d_in, d_out, r, dtype)
    close(torch.ops.vps.linear_backward(*data), expected(*data), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype):
    g, W, features, core, gamma = make(2, 6, 20, 30, 3, dtype)
    views = (
        g.transpose(0, 1).contiguous().transpose(0, 1),
        W.t().contiguous().t(),
        features.transpose(1, 2).contiguous().transpose(1, 2),
        core.mT.contiguous().mT,
        torch.stack([gamma, gamma], 1)[:, 0],
    )
    assert not any(view.is_contiguous() for view in views)
    right = expected(g, W, features, core, gamma)
    close(torch.ops.vps.linear_backward(*views), right, dtype)


def test_groups_and_columns_that_are_left_out():
    data = make(3, 4, 20, 30, 3)
    g, W, _, core, gamma = data
    core[0, 2], core[0, :, 2] = 0, 0
    core[1], gamma[2] = 0, 0
    got = torch.ops.vps.linear_backward(*data)
    close(got, expected(*data), torch.float32)
    assert torch.equal(got[1:], torch.matmul(g, W)[1:])


@pytest.mark.parametrize("groups", [1, 3])
def test_it_is_the_gradient_in_torch(groups):
    g, W, features, core, gamma = make(groups, 9, 40, 50, 4)
    in_torch = gradient.of_input(g, W, features[:, 0], features[:, 1], core, gamma, None, None)
    assert torch.allclose(
        torch.ops.vps.linear_backward(g, W, features, core, gamma), in_torch, atol=1e-5
    )


def test_opcheck():
    torch.library.opcheck(torch.ops.vps.linear_backward.default, make(2, 5, 12, 10, 3))
