"""Kernels of an update that a prompt has fixed, against the formula in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import FAR

pytest.importorskip("triton")
import vps
from vps.algorithm import fixed
from vps.kernels import tuning
from vps.kernels.decode import edited

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [  # groups, tokens, d_in, d_out, r
    (1, 1, 1, 1, 1),
    (1, 1, 300, 70, 4),
    (4, 1, 530, 33, 3),
    (2, 8, 129, 20, 8),
    (1, 16, 64, 2100, 2),
    (1, 9, 70, 40, 16),
    (1, 5, 70, 40, 64),  # from here on x is edited and torch multiplies
    (3, 2, 40, 30, 5),
    (5, 1, 4200, 10, 4),
    (2, 17, 33, 20, 1),
    (1, 257, 2100, 9, 3),
    (1, 18, 30, 9, 17),
]


def layer(groups, tokens, d_in, d_out, r, dtype, device):
    """x, W, b, I_in and E, whose last row leaves its column out."""
    x = torch.randn(groups, tokens, d_in, device=device).to(dtype)
    W = (torch.randn(d_out, d_in, device=device) / d_in**0.5).to(dtype)
    b = torch.randn(d_out, device=device).to(dtype)
    I_in = torch.stack([torch.randperm(d_in, device=device)[:r] for _ in range(groups)])
    through = (torch.randn(groups, r, d_in, device=device) / d_in**0.5).to(dtype)
    if r > 1:
        through[:, -1] = 0
    return x, W, b, I_in, through


def expected(x, W, b, I_in, through):
    """In float64 on the CPU, in the form of torch."""
    x, W, b, I_in, through = (one if one is None else one.cpu() for one in (x, W, b, I_in, through))
    wide = fixed.edited(x.double(), I_in.unsqueeze(1), through.double().mT)
    return F.linear(wide, W.double(), None if b is None else b.double())


def check(x, W, b, I_in, through):
    """As exact as twice torch's own layer, and as torch's form."""
    y, wide = edited.launch(x, W, b, I_in, through), expected(x, W, b, I_in, through)
    assert y.shape == wide.shape and y.dtype == x.dtype and y.is_contiguous()
    plain = F.linear(x.double(), W.double(), None if b is None else b.double())
    own, form = F.linear(x, W, b), F.linear(fixed.edited(x, I_in.unsqueeze(1), through.mT), W, b)

    def error(found, wanted):
        return float((found.double().cpu() - wanted.cpu()).norm() / wanted.norm())

    if x.dtype == torch.float32:
        assert error(y, wide) <= 1e-6
    else:
        rounding = error(wide.to(x.dtype), wide)
        assert error(y, wide) <= 2 * max(rounding, error(own, plain)), error(y, wide)
        assert error(y, wide) <= 2 * max(rounding, error(form, wide))
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_edited(device, dtype, shape):
    x, W, b, I_in, through = layer(*shape, dtype, device)
    check(x, W, b, I_in, through)
    check(x[:, :20], W, None, I_in, through)


@pytest.mark.parametrize("architecture", list(tuning.STREAM))
def test_tiles_of_every_architecture(device, architecture, monkeypatch):
    monkeypatch.setattr(tuning, "architecture", lambda _: architecture)
    for dtype in DTYPES:
        check(*layer(2, 2, 290, 40, 4, dtype, device))


def test_float64(device):
    x, W, b, I_in, through = layer(2, 3, 50, 20, 4, torch.float64, device)
    y = edited.launch(x, W, b, I_in, through)
    torch.testing.assert_close(y.cpu(), expected(x, W, b, I_in, through), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_change_is_not_rounded(device, dtype):
    """Of an x so large that x + e in 16 bits is x."""
    W, through = torch.zeros(1, 2, device=device), torch.zeros(1, 1, 2, device=device)
    W[0, 1], through[0, 0, 0] = 1, 1
    x = torch.tensor([[[1.0, 2048.0]]], device=device)
    I_in = torch.tensor([[1]], device=device)
    x, W, through = x.to(dtype), W.to(dtype), through.to(dtype)
    b = torch.tensor([-2048.0], device=device).to(dtype)
    assert edited.launch(x, W, b, I_in, through).item() == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(device, dtype):
    """Nor on how many there are, which choose a tile."""
    x, W, b, I_in, through = layer(4, 4, 530, 40, 4, dtype, device)
    together = edited.launch(x, W, b, I_in, through)
    assert torch.equal(together, edited.launch(x, W, b, I_in, through))
    for start, stop in itertools.pairwise([0, 1, 4]):
        part = slice(start, stop)
        alone = edited.launch(x[part], W, b, I_in[part], through[part])
        assert torch.equal(together[part], alone)
    alone = [edited.launch(x[:, t : t + 1], W, b, I_in, through) for t in range(4)]
    assert torch.equal(together, torch.cat(alone, 1))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_an_edited_row_does_not_depend_on_the_others(device, dtype):
    x, _, _, I_in, through = layer(3, 20, 5000, 1, 4, dtype, device)
    (together,) = edited.edit(x, [(I_in, through)])
    for g, t in ((0, 0), (2, 7)):
        (alone,) = edited.edit(x[g : g + 1, t : t + 1], [(I_in[g : g + 1], through[g : g + 1])])
        assert torch.equal(together[g, t], alone[0, 0])
    kept = torch.ones(3, 5000, dtype=torch.bool, device=device).scatter(1, I_in[:, :-1], False)
    kept = kept[:, None].expand_as(x)
    assert torch.equal(together[kept], x[kept])


def test_several_layers_in_one_launch(device):
    x, _, _, *first = layer(2, 3, 100, 1, 4, torch.bfloat16, device)
    layers = [first, *(layer(2, 1, 100, 1, 4, x.dtype, device)[3:] for _ in range(2))]
    together = edited.edit(x, layers)
    assert len(together) == 3
    for found, one in zip(together, layers, strict=True):
        assert torch.equal(found, edited.edit(x, [one])[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, 20])
def test_a_broken_token_stays_alone(device, dtype, tokens):
    x, W, b, I_in, through = layer(2, tokens, 40, 50, 4, dtype, device)
    whole = edited.launch(x, W, b, I_in, through)
    x[0, 1, 3], x[1, 0, 7], x[1, 2, I_in[1, 0]] = float("nan"), float("inf"), -float("inf")
    y, form = (
        edited.launch(x, W, b, I_in, through),
        F.linear(fixed.edited(x, I_in.unsqueeze(1), through.mT), W, b),
    )
    assert torch.equal(y.isfinite(), form.isfinite()) and torch.equal(y.isnan(), form.isnan())
    broken = torch.zeros(2, tokens, dtype=torch.bool, device=device)
    broken[0, 1] = broken[1, 0] = broken[1, 2] = True
    assert torch.equal(y[~broken], whole[~broken]) and not y[broken].isfinite().any()


@pytest.mark.parametrize("tokens", [3, 20])
def test_strides(device, tokens):
    x, W, b, I_in, through = layer(2, tokens, 30, 20, 4, torch.float32, device)
    for view in (x.repeat(1, 1, 2)[..., ::2], x.transpose(0, 2).contiguous().transpose(0, 2)):
        for weight in (W.T.contiguous().T, W.repeat(1, 2)[:, 1:31]):
            check(view, weight, b.repeat_interleave(3)[::3], I_in, through)
    check(x[:1].expand_as(x), W, b, I_in.repeat(1, 2)[:, :4], through[:1].expand_as(through))
    check(x[:, -1:], W, b, I_in.T.contiguous().T, through.transpose(1, 2).contiguous().mT)


def test_empty(device):
    for shape in ((0, 3, 8, 5, 2), (2, 0, 8, 5, 2), (1, 1, 8, 0, 2)):
        x, W, b, I_in, through = layer(max(shape[0], 1), *shape[1:], torch.float32, device)
        x, I_in, through = x[: shape[0]], I_in[: shape[0]], through[: shape[0]]
        assert edited.launch(x, W, b, I_in, through).shape == (*shape[:2], shape[3])


def test_beyond_2_31_elements(device, sparse):
    x, W, b, I_in, through = layer(2, 1, 4, 5, 3, torch.float16, device)
    rows = sparse.as_strided((5, 4), (FAR, 1))
    rows.copy_(W)
    check(x, rows, b, I_in, through)
    columns, far = sparse.as_strided((5, 4), (1, FAR)), sparse.as_strided((2, 1, 4), (FAR, 0, 1))
    columns.copy_(W)
    check(x, columns, b, I_in, through)
    far.copy_(x)
    check(far, W, b, I_in, through)
    assert torch.equal(*(edited.edit(one, [(I_in, through)])[0] for one in (far, x)))


def test_few_kernels_for_all_lengths(device, monkeypatch):
    """Triton compiles anew for other constants, and for an integer that is 1 or divides by 16."""
    if device == "cuda":
        pytest.skip("reads what the interpreter keeps")
    seen = set()

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                named = zip(self.kernel.arg_names, arguments, strict=False)
                special = [
                    (name, value == 1, value % 16 == 0)
                    for name, value in named
                    if isinstance(value, int)
                    and name not in self.kernel.kwargs["do_not_specialize"]
                ]
                seen.add(str((self.kernel.fn, special, constants)))

            return launch

    for name in ("edited_gemv_kernel", "edit_kernel"):
        monkeypatch.setattr(edited, name, Kernel(getattr(edited, name)))
    W, I_in, through = torch.empty(4, 64), torch.empty(1, 4), torch.empty(1, 4, 64)
    for tokens in range(1, 4097):
        edited.launch(torch.empty(1, tokens, 64), W, None, I_in, through)
    assert len(seen) == 4  # rows up to 8, 16, 255, more


@pytest.mark.parametrize("groups", [1, 5])
def test_captured_equals_eager(device, groups):
    if device == "cpu":
        pytest.skip("captures a CUDA graph")
    x, *rest = layer(groups, 1, 512, 768, 4, torch.bfloat16, device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        edited.launch(x, *rest)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = edited.launch(x, *rest)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, edited.launch(x, *rest))


def test_errors():
    x, W, b, I_in, through = layer(2, 1, 6, 5, 2, torch.float32, "cpu")
    for wrong in (through[:1], through[..., :5], through[:, :1], through.half()):
        for tokens in (1, 20):
            with pytest.raises(ValueError, match=r"and through \[2, 2, 6\] torch.float32 to fit x"):
                edited.launch(x.expand(2, tokens, 6), W, b, I_in, wrong)
    with pytest.raises(ValueError, match=r"I_in must be \[2, 2\] .* got \(1, 2\)"):
        edited.launch(x, W, b, I_in[:1], through)
    for weight in (W[:, :5], W.half()):
        with pytest.raises(ValueError, match=r"weight must be \[d_out, 6\] torch.float32"):
            edited.launch(x, weight, b, I_in, through)


@pytest.mark.parametrize("clamp", [None, 0.5])
def test_a_model_after_its_prompt(device, clamp):
    """The backend takes the kernels; a clamp and a gradient take the form of torch."""
    from tiny import tiny

    found, ids = [], torch.arange(14, device=device).view(2, 7)
    for name in ("torch", "triton"):
        model = tiny("qwen2", torch.float32, num_hidden_layers=1).to(device)
        vps.patch(model, vps.VPSConfig(scope="prompt", clamp=clamp))
        with vps.backend(name):
            with torch.no_grad():
                past = model(ids).past_key_values
                first = model(ids[:, :1], past_key_values=past).logits
            found.append((first, model(ids[:, :1], past_key_values=past).logits))
    torch.testing.assert_close(*found)
