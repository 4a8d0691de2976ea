"""Kernel of the update against the formula in float64."""

import pytest
import torch
from cases import FAR

pytest.importorskip("triton")
from vps.kernels import columns
from vps.kernels.prefill import delta

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ACCURACY = {torch.float32: 1e-6, torch.float64: 1e-14}


def layer(groups, tokens, d_in, d_out, r, dtype, device):
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    H = torch.randn(groups, tokens, d_out, device=device).to(dtype)
    W = (torch.randn(d_out, d_in, device=device) / d_in**0.5).to(dtype)
    b = torch.randn(d_out, device=device).to(dtype)
    I_in, I_out = (
        torch.stack([torch.randperm(d, device=device)[:r] for _ in range(groups)])
        for d in (d_in, d_out)
    )
    core = torch.randn(groups, r, r, device=device, dtype=accumulate)
    gamma = torch.rand(groups, device=device, dtype=accumulate) + 0.1
    return H, b, W, I_in, I_out, core, gamma


def expected(H, bias, W, I_in, I_out, core, gamma, active, clamp):
    """In float64 on the CPU."""
    H, W, core = H.double().cpu(), W.double().cpu(), core.double().cpu()
    y = H.clone() if bias is None else H + bias.double().cpu()
    for g, strength in enumerate(gamma.tolist()):
        n = I_in.shape[1] if active is None else int(active[g])
        t, B = H[g][:, I_out[g, :n].cpu()], W[:, I_in[g, :n].cpu()]
        update = t @ core[g, :n, :n] @ B.T
        if clamp is not None:
            update = update.clamp(-clamp, clamp)
        if strength:
            y[g] += strength * update
    return y


def check_selected(t, H, I_out, active, clamp):
    """``H[:, I_out]``, 0 where inactive, if there is a clamp."""
    if clamp is None:
        assert t.shape == (0,)
        return
    wanted = H.gather(2, I_out[:, None].expand(-1, H.shape[1], -1))
    if active is not None:
        left_out = torch.arange(I_out.shape[1], device=H.device) >= active[:, None]
        wanted = wanted.masked_fill(left_out[:, None], 0)
    torch.testing.assert_close(t, wanted, rtol=0, atol=0, equal_nan=True)


def run(H, bias, W, I_in, *others):
    return delta.launch(H, bias, columns.launch(W, I_in), *others)


def check(*arguments):
    (y, t), wide = run(*arguments), expected(*arguments)
    H = arguments[0]
    check_selected(t, H, arguments[4], *arguments[7:])
    assert y.dtype == H.dtype and y.is_contiguous()
    assert torch.equal(y.isfinite().cpu(), wide.isfinite())
    y, finite = y.double().cpu(), wide.isfinite()
    error = (y - wide)[finite].norm() / wide[finite].norm()
    torch_error = (wide.to(H.dtype).double() - wide)[finite].norm() / wide[finite].norm()
    assert error <= ACCURACY.get(H.dtype, 2 * torch_error), float(error)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "groups, tokens, d_in, d_out, r",
    [(1, 1, 1, 1, 1), (3, 1, 20, 530, 4), (2, 9, 33, 17, 8), (1, 5, 70, 66, 64), (2, 20, 5, 5, 3)],
)
def test_delta(device, dtype, groups, tokens, d_in, d_out, r):
    H, b, *rest = layer(groups, tokens, d_in, d_out, r, dtype, device)
    check(H, b, *rest, None, None)
    check(H, None, *rest, None, 0.05)
    active = torch.arange(groups, device=device, dtype=torch.int32) % (r + 1)
    masked = (torch.arange(r, device=device) < active[:, None]).to(rest[3].dtype)
    rest[3] = rest[3] * masked[:, :, None] * masked[:, None, :]
    check(H, b, *rest, active, None)
    check(H, b, *rest, active, 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_takes_no_part_never_leaks(device, dtype):
    """NaN in inactive columns of H or W, in one token, and in a group of γ = 0."""
    H, b, W, I_in, I_out, core, gamma = layer(3, 6, 12, 20, 4, dtype, device)
    active = torch.tensor([2, 0, 4], dtype=torch.int32, device=device)
    core[0, 2:], core[0, :, 2:], core[1] = 0, 0, 0
    I_out[0], I_in[0] = torch.tensor([1, 3, 5, 7]), torch.tensor([0, 2, 4, 6])
    I_in[1:] = torch.tensor([8, 9, 10, 11])
    H[0, :, 5], H[0, :, 7], H[2, 3] = float("nan"), float("inf"), float("nan")
    W[:, 4], W[:, 6] = float("nan"), float("inf")
    y = check(H, b, W, I_in, I_out, core, gamma, active, None)
    assert y[0].isfinite().sum() == 6 * 18 and y[1].isfinite().all()
    assert y[2].isfinite().all(1).tolist() == [True, True, True, False, True, True]
    check(H, b, W, I_in, I_out, core, gamma, active, 0.1)
    gamma[:], W[:, 8] = 0, float("nan")
    for bias in (None, b):
        y, _ = run(H, bias, W, I_in, I_out, core, gamma, active, None)
        assert torch.equal(y.nan_to_num(), (H if bias is None else H + bias).nan_to_num())


def test_strides(device):
    H, b, W, I_in, I_out, core, gamma = layer(2, 5, 12, 20, 3, torch.float32, device)
    shape = 2, 5, 20
    for view in (H.permute(2, 0, 1).contiguous().permute(1, 2, 0), H[:, ::2], H[:1].expand(shape)):
        check(view, b, W, I_in, I_out, core, gamma, None, None)
    transposed, spread = W.T.contiguous().T, b.repeat_interleave(2)[::2]
    check(H, spread, transposed, I_in, I_out.T.contiguous().T, core.mT, gamma, None, None)
    shared = I_in[:1].expand(2, 3)
    both = torch.stack([I_in, I_out], 1)
    check(H, b, W, *both.unbind(1), core, gamma, None, 0.1)
    check(H, b, W.repeat(1, 2)[:, ::2], shared, I_out, core, gamma[:1].expand(2), None, None)


def test_beyond_2_31_elements(device, sparse):
    _, b, _, I_in, I_out, core, gamma = layer(1, 4, 6, 5, 2, torch.float16, device)
    H, W = sparse.as_strided((1, 4, 5), (0, FAR, 1)), sparse.as_strided((5, 6), (FAR, 1), 9)
    H.copy_(torch.randn(1, 4, 5)), W.copy_(torch.randn(5, 6))
    check(H, b, W, I_in, I_out, core, gamma, None, None)
    H, W = sparse.as_strided((1, 4, 5), (0, 1, FAR)), sparse.as_strided((5, 4), (1, FAR), 9)
    check(H, b, W, I_in % 4, I_out, core, gamma, None, None)


@pytest.mark.parametrize("tokens", [1, 11])
def test_a_group_does_not_depend_on_the_others(device, tokens):
    H, b, W, *rest = layer(4, tokens, 12, 40, 3, torch.bfloat16, device)
    together, t = run(H, b, W, *rest, None, 0.1)
    assert torch.equal(together, run(H, b, W, *rest, None, 0.1)[0])
    for g in range(4):
        one = slice(g, g + 1)
        alone, t_alone = run(H[one], b, W, *(tensor[one] for tensor in rest), None, 0.1)
        assert torch.equal(together[one], alone) and torch.equal(t[one], t_alone)


def test_no_token(device):
    H, *rest = layer(2, 0, 3, 4, 2, torch.float32, device)
    y, t = run(H, *rest, None, 0.1)
    assert y.shape == (2, 0, 4) and t.shape == (2, 0, 2)


def test_errors():
    H, b, W, I_in, I_out, core, gamma = layer(2, 3, 4, 5, 2, torch.float32, "cpu")
    with pytest.raises(TypeError, match="int64"):
        run(H.long(), b, W, I_in, I_out, core, gamma, None, None)
    with pytest.raises(TypeError, match="int64"):
        run(H, b, W.long(), I_in, I_out, core, gamma, None, None)
    with pytest.raises(ValueError, match=r"weight must be \[d_out, d_in\]"):
        run(H, b, W[0], I_in, I_out, core, gamma, None, None)
    with pytest.raises(ValueError, match="I_in must be int64"):
        run(H, b, W, I_in.int(), I_out, core, gamma, None, None)
    with pytest.raises(ValueError, match=r"H must be \[2, T, 5\]"):
        run(H[:1], b, W, I_in, I_out, core, gamma, None, None)
    with pytest.raises(ValueError, match=r"core must be \[G, r, r\]"):
        run(H, b, W, I_in, I_out, core[:, :1], gamma, None, None)
