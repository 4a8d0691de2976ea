"""VPSLinear against the reference, and as a drop-in for nn.Linear."""

import contextlib
import copy

import pytest
import torch
from cases import copies, in_threads
from torch import nn
from torch._dynamo.testing import CompileCounter

import vps
from vps import VPSConfig, VPSLinear, reference, token_mask, vps_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_lower_index(dtype):
    """Selected features show in the update: γ·clamp off, τ off, one token, W diagonal."""
    from vps.algorithm.selection import top_k

    scores = torch.tensor([[2.0, 3.0, 3.0, 0.0, 3.0, 0.0], [0.0] * 6], dtype=dtype)
    assert top_k(scores, 4).tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_with_ties_stand_beside_rows_without(dtype):
    from vps.algorithm.selection import top_k

    scores = torch.tensor(
        [[3, 1, 2, 0, 5], [2, 2, 2, 2, 2], [0, 4, 1, 4, 3], [9, 7, 7, 8, 6]], dtype=dtype
    )
    assert top_k(scores, 2).tolist() == [[4, 0], [0, 1], [1, 3], [0, 3]]
    assert top_k(scores, 3).tolist() == [[4, 0, 2], [0, 1, 2], [1, 3, 4], [0, 3, 1]]
    assert top_k(scores, 5).tolist()[3] == [0, 3, 1, 2, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scope", ["sequence", "token"])
@pytest.mark.parametrize("builder", ["sk", "sc"])
def test_narrow_dtypes_stay_near_float64(dtype, scope, builder):
    torch.manual_seed(3)
    linear = nn.Linear(48, 40, dtype=dtype)
    x = torch.randn(2, 6, 48).to(dtype)
    config = VPSConfig(scope=scope, builder=builder, adaptive_gamma=False)
    layer = VPSLinear.from_linear(linear, config)
    with torch.no_grad():
        y = layer(x)
        H = nn.functional.linear(x, linear.weight)
        wide = reference.vps_linear(
            x.double(), linear.weight.double(), linear.bias.double(), config=config
        )
        # Selection is defined on the rounded H: skip nothing, compare where both choose alike.
        scores = H.float().abs().mean(1) if scope == "sequence" else H.float().abs().flatten(0, 1)
        chosen = scores.sort(dim=-1, descending=True, stable=True).indices[:, :4]
        alike = [
            torch.equal(c[: g.rank], g.I_out[: g.rank])
            for c, g in zip(chosen, wide.groups, strict=True)
        ]
        plain_error = (linear(x).double() - (wide.H + linear.bias.double()).view_as(wide.y)).norm()
    error = (y.double() - wide.y).reshape(len(alike), -1)[torch.tensor(alike)].norm()
    assert sum(alike) >= len(alike) / 2
    assert error <= 4 * plain_error + 1e-6


def test_shapes_and_empty_inputs():
    layer = VPSLinear.from_linear(nn.Linear(6, 5))
    plain = layer.to_linear()
    for shape in [(6,), (0, 6), (2, 0, 6), (0, 3, 6), (1, 2, 3, 6)]:
        x = torch.randn(shape)
        assert layer(x).shape == plain(x).shape


def test_off_is_bit_identical_to_the_base():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        linear = nn.Linear(300, 70, dtype=dtype)
        x = torch.randn(2, 9, 300).to(dtype)
        for config in (
            VPSConfig(gamma=0.0, adaptive_gamma=False),
            VPSConfig(gamma_bounds=(0.0, 0.0)),
        ):
            assert torch.equal(VPSLinear.from_linear(linear, config)(x), linear(x))
        layer = VPSLinear.from_linear(linear)
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[1] = False
        with token_mask(mask):
            y = layer(x)
        assert torch.equal(y[1], linear(x)[1])
        assert not torch.equal(y[0], linear(x)[0])


def test_sc_does_not_depend_on_the_order_of_features():
    torch.manual_seed(2)
    W, x = torch.randn(12, 15, dtype=torch.float64), torch.randn(7, 15, dtype=torch.float64)
    config = VPSConfig(builder="sc", order=2)
    rows, columns = torch.randperm(12), torch.randperm(15)
    y = vps_linear(x, W, None, config)
    permuted = vps_linear(x[:, columns], W[rows][:, columns], None, config)
    assert torch.allclose(permuted, y[:, rows], rtol=0, atol=1e-12)


def test_norms_are_never_stale():
    torch.manual_seed(5)
    config = VPSConfig(tau=0.3)
    layer = VPSLinear.from_linear(nn.Linear(10, 11, dtype=torch.float64), config)
    x = torch.randn(4, 10, dtype=torch.float64)

    def check():
        with torch.no_grad():
            W, b = layer.weight.double(), layer.bias.double()
            expected = reference.vps_linear(x, W, b, config=config).y
            atol = 1e-12 if layer.weight.dtype == torch.float64 else 1e-5
            y = layer(x.to(layer.weight.dtype)).double()
            assert torch.allclose(y, expected, rtol=0, atol=atol)

    check()
    layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()})
    check()
    layer.weight.data.mul_(0.25)
    check()
    with torch.no_grad():
        layer.weight[3] *= 9
    check()
    layer.weight.data = torch.randn_like(layer.weight)
    check()
    layer(x).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    check()
    twin = copy.deepcopy(layer)
    twin.weight.data.mul_(3)
    check()
    layer.to(torch.float32)
    check()


def test_stays_an_ordinary_module():
    linear = nn.Linear(6, 7)
    layer = VPSLinear.from_linear(linear, VPSConfig(rank=1, adaptive_rank=False))
    x = torch.randn(3, 6)
    assert isinstance(layer, nn.Linear) and layer.weight is linear.weight
    assert list(layer.state_dict()) == list(linear.state_dict())
    linear.load_state_dict(layer.state_dict())
    for twin in copies(layer):
        assert twin.config == layer.config and twin.weight is not layer.weight
        assert torch.equal(twin(x), layer(x))
    assert copy.deepcopy(layer).half().weight.dtype == torch.float16


def test_autocast_equals_the_narrow_layer():
    linear = nn.Linear(16, 12)
    layer = VPSLinear.from_linear(linear)
    narrow = copy.deepcopy(layer).to(torch.bfloat16)
    x = torch.randn(5, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, narrow(x.bfloat16()))
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("settings", [{}, {"builder": "sc", "order": 2}, {"builder": "random"}])
@pytest.mark.parametrize("backend", ["torch", "fastest"])
def test_compiles_without_a_graph_break(settings, backend):
    torch._dynamo.reset()
    layer = VPSLinear.from_linear(nn.Linear(16, 24), VPSConfig(**settings))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 16, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])

    def agree():
        leaves, found = (x, layer.weight, layer.bias), []
        for run in (compiled, layer):
            y = run(x)
            found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)

    with vps.backend("torch") if backend == "torch" else contextlib.nullcontext():
        agree()
        with token_mask(mask):
            agree()
        with torch.no_grad():
            assert torch.allclose(compiled(x), layer(x), atol=1e-6)


@torch.no_grad()
def test_compiled_reads_the_selected_columns_alone():
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(vps_linear, backend=lambda graph, _: graphs.append(graph) or graph)
    with vps.backend("torch"):
        compiled(torch.randn(2, 3, 300), torch.randn(40, 300))
    called = [getattr(node.target, "__name__", node.target) for node in graphs[0].graph.nodes]
    assert len(graphs) == 1 and called.count("linear") == 1  # all of W is read by the base layer


def test_threads_have_their_own_masks():
    layer = VPSLinear.from_linear(nn.Linear(8, 8))
    x = torch.randn(2, 4, 8)
    masks = [torch.rand(2, 4) < 0.6 for _ in range(4)]
    expected = []
    for mask in masks:
        with token_mask(mask):
            expected.append(layer(x))

    def same(index):
        with token_mask(masks[index]):
            return torch.equal(layer(x), expected[index])

    assert in_threads(lambda index: all(same(index) for _ in range(100)), range(4))


def test_bad_input_is_named():
    layer = VPSLinear.from_linear(nn.Linear(6, 5))
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 6\].*\(2, 7\)"):
        layer(torch.randn(2, 7))
    with pytest.raises(TypeError, match="floating point.*int64"):
        layer(torch.ones(2, 6, dtype=torch.int64))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        layer([1.0] * 6)
    with pytest.raises(TypeError, match="dense tensor, got layout torch.sparse_coo"):
        layer(torch.eye(6).to_sparse())
    with pytest.raises(TypeError, match="bool"):
        with token_mask(torch.ones(2)):
            pass
    with pytest.raises(ValueError, match=r"mask must have the shape.*\(2, 3\).*\(2, 4\)"):
        with token_mask(torch.ones(2, 4, dtype=torch.bool)):
            layer(torch.randn(2, 3, 6))
    with pytest.raises(TypeError, match="weight norm or a parametrization|type is"):
        VPSLinear.from_linear(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))


@pytest.mark.parametrize("scope", ["sequence", "token", "batch"])
@torch.no_grad()
def test_one_graph_for_every_number_of_tokens(scope):
    torch.compiler.reset()
    layer = VPSLinear(8, 6, config=VPSConfig(scope=scope)).double()  # computed by torch
    count = CompileCounter()
    compiled = torch.compile(layer, backend=count, fullgraph=True, dynamic=True)
    for sequences, tokens in ((2, 3), (2, 5), (3, 7), (4, 9)):
        x = torch.randn(sequences, tokens, 8, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-12, atol=1e-12)
    assert count.frame_count == 1


@pytest.mark.parametrize("builder", ["sk", "sc"])
@torch.no_grad()
def test_an_export_takes_every_number_of_tokens(builder):
    layer = VPSLinear(8, 6, config=VPSConfig(builder=builder)).double()  # computed by torch
    sizes = {0: torch.export.Dim("sequences", max=64), 1: torch.export.Dim("tokens", max=512)}
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    exported = torch.export.export(layer, (x,), dynamic_shapes={"input": sizes}).module()
    for sequences, tokens in ((2, 2), (3, 7), (9, 40)):
        x = torch.randn(sequences, tokens, 8, dtype=torch.float64)
        torch.testing.assert_close(exported(x), layer(x), rtol=1e-9, atol=1e-12)
