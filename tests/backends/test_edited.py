"""torch.ops.vps.edited: the change of x before the product, in C++ and where torch stands in."""

import pytest
import torch
import torch.nn.functional as F

from vps.algorithm.fixed import edited

EDITED = torch.ops.vps.edited.default
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make(groups, tokens, d_in, d_out, r, dtype=torch.float32, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x, W = draw(groups, tokens, d_in), draw(d_out, d_in) / d_in**0.5
    I_in = torch.stack([torch.randperm(d_in, generator=generator)[:r] for _ in range(groups)])
    through = draw(groups, r, d_in) / d_in**0.5
    b = draw(d_out).to(dtype) if bias else None
    return x.to(dtype), W.to(dtype), b, I_in, through.to(dtype)


def exact(x, W, b, I_in, through):
    wide = edited(x.double(), I_in.unsqueeze(1), through.double().mT)
    return F.linear(wide, W.double(), None if b is None else b.double())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_product_of_the_changed_x(dtype, bias):
    few = [(groups, 1) for groups in range(1, 10)]
    for groups, tokens in [*few, (1, 4), (2, 2), (1, 5), (3, 3), (2, 300)]:
        for d_in, d_out, r in [(1, 1, 1), (7, 5, 3), (64, 48, 4), (130, 67, 13)]:
            arguments = make(groups, tokens, d_in, d_out, r, dtype, bias)
            y, right = EDITED(*arguments), exact(*arguments)
            assert y.dtype == dtype and y.shape == right.shape
            size = right.abs().max().clamp(min=1)
            assert (y.double() - right).abs().max() <= TOLERANCES[dtype] * size


def test_any_strides():
    x, W, b, I_in, through = make(3, 2, 24, 20, 4)
    right = EDITED(x, W, b, I_in, through)
    spread = W.repeat_interleave(2, 1)[:, ::2]
    for weight in (spread, W.t().contiguous().t(), W.repeat(2, 1)[:20]):
        for other in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
            found = EDITED(other, weight, b, I_in.t().contiguous().t(), through)
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_the_others():
    x, W, b, I_in, through = make(8, 1, 100, 61, 4)
    together = EDITED(x, W, b, I_in, through)
    for row in range(8):
        own = slice(row, row + 1)
        assert torch.equal(EDITED(x[own], W, b, I_in[own], through[own])[0], together[row])


def test_values_that_are_not_finite_stay_in_their_row():
    x, W, b, I_in, through = make(2, 1, 40, 30, 4)
    x[0, 0, 3] = float("nan")
    y = EDITED(x, W, b, I_in, through)
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_arguments_are_checked():
    x, W, b, I_in, through = make(2, 3, 12, 10, 4)
    for arguments, message in [
        ((x[0], W, b, I_in, through), r"x must have shape \[G, T, d_in\]"),
        ((x, W.double(), b, I_in, through), "weight must be float32"),
        ((x, W, b[:3], I_in, through), r"bias must have shape \[10\]"),
        ((x, W, b, I_in[:1], through), r"I_in must have shape \[2, 4\]"),
        ((x, W, b, I_in + 12, through), "I_in must hold features from 0 to 11"),
        ((x, W, b, I_in, through[:, :3]), r"through must have shape \[2, 4, 12\]"),
        ((x, W, b, I_in, through.half()), "through must be float32"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            EDITED(*arguments)


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    torch.library.opcheck(EDITED, make(2, 3, 12, 10, 4, bias=bias))
