"""Kernels of the decode step against the formula in float64."""

import itertools

import pytest
import torch
from cases import FAR

pytest.importorskip("triton")
from vps import VPSConfig, reference
from vps.kernels import tuning
from vps.kernels.decode import decode

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
CONFIG = VPSConfig(scope="token", builder="sk")
POLICY = [1.0, 0.3, 0.8, 1, 4, 32, 32, 1, 1]
SHAPES = [(1, 1, 1, 1), (3, 33, 70, 4), (5, 20, 40, 8), (2, 600, 290, 3)]


def layer(tokens, d_in, d_out, dtype, device):
    """Multiples of 1/8 and 1/16, so that H is exact before it is rounded, with many ties."""
    x = (torch.randn(tokens, 1, d_in, device=device) * 3).round().clamp(-9, 9) / 8
    W = (torch.randn(d_out, d_in, device=device) * 3).round().clamp(-9, 9) / 16
    b = torch.randn(d_out, device=device)
    return x.to(dtype), W.to(dtype), b.to(dtype)


def numbers(device, values=POLICY):
    return torch.tensor(values, dtype=torch.float64, device=device)


def decoded(x, W, b, mask, I_in, I_out, policy, entropy, r, adaptive, tau, clamp):
    I_out = None if I_out is None else I_out[:, None]
    layers = [decode.Layer(W, b, policy)]
    return decode.launch(x, layers, mask, I_in, I_out, entropy, r, adaptive, tau, clamp)[0]


def check(x, W, b, mask, I_in, I_out, policy, entropy, r, adaptive, tau, clamp):
    y, features, core, gamma, t = (
        out.cpu()
        for out in decoded(x, W, b, mask, I_in, I_out, policy, entropy, r, adaptive, tau, clamp)
    )
    factor, *bounds = policy.tolist()
    X, wide = x[:, 0].double().cpu(), W.double().cpu()
    H = (X @ wide.T).to(x.dtype).double()
    expected = H.clone() if b is None else H + b.double().cpu()
    for n in range(len(x)):
        counted = mask is None or bool(mask[n])
        clean = reference.clean(H[n]) * counted
        chosen = I_in, I_out
        scores = reference.clean(X[n]).abs(), clean.abs()
        for side, (given, s) in enumerate(zip(chosen, scores, strict=True)):
            wanted = reference.top_k(s, r) if given is None else given[n].cpu()
            assert torch.equal(features[n, side], wanted)
        sigma = -torch.expm1(-clean.square().mean()).item() if adaptive else 0.0
        if entropy is not None and adaptive:
            sigma = max(sigma, min(1.0, entropy[0].item() / 3)) * entropy[1].item()
        sigma = min(1.0, factor * sigma)
        active = int(bounds[2] + (bounds[3] - bounds[2]) * sigma + reference.FLOOR_GUARD)
        active = min(active, r) if counted else 0
        strength = bounds[0] + (bounds[1] - bounds[0]) * sigma if counted else 0.0
        assert float(gamma[n]) == pytest.approx(strength, rel=1e-6)
        left, right = features[n, 0, :active], features[n, 1, :active]
        A, B = wide[right].T, wide[:, left]
        s = reference.clip_scale(A, B, tau, "component")
        diagonal = torch.zeros(r, dtype=torch.float64)
        diagonal[:active] = 1 / s
        torch.testing.assert_close(core[n].double(), diagonal.diag(), rtol=3e-6, atol=0)
        update = (H[n, right] / s) @ B.T
        if clamp is not None:
            update = update.clamp(-clamp, clamp)
            selected = torch.zeros(r, dtype=x.dtype)
            selected[:active] = H[n, right].to(x.dtype)
            torch.testing.assert_close(t[n, 0], selected, rtol=0, atol=0, equal_nan=True)
        if strength:
            expected[n] += strength * update
    assert clamp is not None or t.shape == (0,)
    finite = expected.isfinite()
    assert torch.equal(y[:, 0].isfinite(), finite) and y.dtype == x.dtype
    error = (y[:, 0].double() - expected)[finite].norm()
    rounding = (expected.to(x.dtype).double() - expected)[finite].norm()
    bound = 1e-6 * expected[finite].norm() if x.dtype == torch.float32 else 2 * rounding
    assert error <= bound
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, d_in, d_out, r", SHAPES)
def test_decode(device, dtype, tokens, d_in, d_out, r):
    x, W, b = layer(tokens, d_in, d_out, dtype, device)
    policy = numbers(device)
    check(x, W, b, None, None, None, policy, None, r, True, 0.8, None)
    fixed = numbers(device, [1.0, 0.65, 0.65, 2, 2, 32, 32, 1, 1])
    check(x, W, None, None, None, None, fixed, None, r, False, None, None)
    mask = torch.arange(tokens, device=device)[:, None] % 2 == 0
    check(x, W, b, mask, None, None, policy, None, r, True, 0.1, 0.05)
    nats = torch.tensor([2.5, 0.7], dtype=torch.float64, device=device)
    I_in = torch.arange(r, device=device).expand(tokens, r) % d_in
    I_out = (torch.arange(r, device=device) * 5 % d_out).expand(tokens, r)
    check(x, W, b, None, I_in, I_out, numbers(device, [1.3, *POLICY[1:]]), nats, r, True, 0.8, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_the_product(device, dtype):
    """On values whose sums are not exact, given the selection."""
    x = torch.randn(5, 1, 700, device=device).to(dtype)
    W = (torch.randn(300, 700, device=device) / 26).to(dtype)
    y, features, core, gamma, _ = decoded(
        x, W, None, None, None, None, numbers(device), None, 4, True, 0.8, None
    )
    wide = W.double()
    H = x[:, 0].double() @ wide.T
    expected = H.clone()
    for n, (left, right) in enumerate(features):
        t = H[n, right].to(dtype).double()
        expected[n] += gamma[n].double() * (t @ core[n].double() @ wide[:, left].T)
    error = (y[:, 0].double() - expected).norm() / expected.norm()
    torch_error = (x[:, 0] @ W.T - H).norm() / H.norm()
    assert error <= (1e-6 if dtype == torch.float32 else 2 * torch_error)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_token_stays_alone(device, dtype):
    x, W, b = layer(4, 40, 50, dtype, device)
    x[1, 0, 3], x[2, 0, 7] = float("nan"), float("inf")
    y, features, core, gamma, _ = decoded(
        x, W, b, None, None, None, numbers(device), None, 4, True, 0.8, None
    )
    assert y[[0, 3]].isfinite().all() and y[1].isnan().all() and not y[2].isfinite().any()
    assert core.isfinite().all() and gamma.isfinite().all()
    assert features[1, 1].tolist() == [0, 1, 2, 3] and 3 not in features[1, 0]
    for n in (0, 3):
        alone = decoded(x[n : n + 1], W, b, None, None, None, numbers(device), None, 4, True,
                              0.8, None)[0]  # fmt: skip
        assert torch.equal(y[n : n + 1], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_the_others(device, dtype):
    x = torch.randn(16, 1, 530, device=device).to(dtype)
    W = torch.randn(40, 530, device=device).to(dtype) / 23
    mask = torch.arange(16, device=device)[:, None] != 4
    rest = None, None, numbers(device), None, 2, True, 0.8, 0.5
    together = decoded(x, W, None, mask, *rest)
    again = decoded(x, W, None, mask, *rest)
    for whole, repeated in zip(together, again, strict=True):
        assert torch.equal(whole, repeated)
    for start, stop in itertools.pairwise([0, 1, 5, 16]):
        part = decoded(x[start:stop], W, None, mask[start:stop], *rest)
        for whole, single in zip(together, part, strict=True):
            assert torch.equal(whole[start:stop], single)


def test_strides(device):
    x, W, b = layer(3, 30, 20, torch.float32, device)
    rest = None, None, None, numbers(device), None, 4, True, 0.8, None
    for view in (x.repeat(1, 1, 2)[..., ::2], x.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        for weight in (W.T.contiguous().T, W.repeat(1, 2)[:, 1:31]):
            check(view, weight, b.repeat_interleave(3)[::3], *rest)
    check(x[:1].expand(3, 1, 30), W, b, *rest)


@pytest.mark.parametrize("rows", [32, 128])
def test_records_of_large_tiles(device, monkeypatch, rows):
    """As for more than 8192 outputs, with the best ones far apart and few in a tile."""
    monkeypatch.setattr(tuning, "gemv_rows", lambda width: rows)
    W = torch.zeros(300, 4, device=device)
    W[[5, 6, 299, 160], [0, 1, 2, 3]] = torch.tensor([0.5, 0.5, 2.0, 1.0], device=device)
    x = torch.ones(1, 1, 4, device=device)
    check(x, W, None, None, None, None, numbers(device), None, 4, True, 0.8, None)


def test_beyond_2_31_elements(device, sparse):
    x, values, b = layer(2, 6, 5, torch.float16, device)
    rest = None, None, None, numbers(device), None, 3, True, 0.8, None
    rows = sparse.as_strided((5, 6), (FAR, 1))
    rows.copy_(values)
    check(x, rows, b, *rest)
    columns, far = (
        sparse.as_strided((5, 4), (1, FAR)),
        sparse.as_strided((2, 1, 4), (FAR, 0, 1)),
    )
    columns.copy_(values[:, :4]), far.copy_(x[..., :4])
    check(x[..., :4], columns, b, *rest)
    check(far, values[:, :4], b, *rest)


def test_errors():
    x, W, b = layer(2, 6, 5, torch.float32, "cpu")
    rest = None, None, None, numbers("cpu"), None
    for arguments, r, message in [
        ((x.double(), W.double()), 2, "one dtype of 16 or 32 bits, got torch.float64"),
        ((x, W.half()), 2, "got torch.float32, torch.float16"),
        ((x.view(1, 2, 6), W), 2, r"x must be \[1 to 16, 1, d_in\]"),
        ((x.expand(2, 1, 6).repeat(9, 1, 1), W), 2, r"got \(18, 1, 6\)"),
        ((x, W[:, :4]), 2, r"weight must be \[d_out, 6\]"),
        ((x, W), 6, "r must be from 1 to 5, got 6"),
        ((x, torch.ones(1, 6).expand(300_000, 6)), 4, "too many tiles"),
    ]:
        with pytest.raises(ValueError, match=message):
            decoded(*arguments, b, *rest, r, True, 0.8, None)
