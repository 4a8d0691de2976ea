"""Layers of a traced graph share selections and calls by value, not by the tensor that held it."""

import pytest
import torch
from tiny import tiny
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import vps
from vps import VPSConfig, vps_linear


@pytest.fixture(autouse=True)
def reset():
    torch.compiler.reset()


def traced(function):
    """``function`` compiled, and the nodes of ours in its graphs as they come."""
    nodes = []

    def keep(graph, _):
        ours = torch.ops.vps.linear.default, torch.ops.vps.linear_pair.default
        ours = (*ours, torch.ops.vps.couple.default)
        nodes.extend(node for node in graph.graph.nodes if node.target in ours)
        return graph

    backend = aot_autograd(fw_compiler=keep)
    return torch.compile(function, backend=backend, fullgraph=True), nodes


def given(node):
    """Arguments of a node by name."""
    return dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))


def selecting(nodes):
    """Those that are not told what to select."""
    return [given(node)["I_in"] is None for node in nodes]


def weights(*widths, d_in=24):
    return [torch.randn(width, d_in) for width in widths]


def two_layers(x, first, second, between=lambda x: None, **options):
    """Outputs of two layers that read x, with something ``between``."""
    y = vps_linear(x, first, **options)
    between(x)
    return y, vps_linear(x, second, **options)


def check(function, *arguments):
    """Compiled as eager, on copies; the nodes."""
    compiled, nodes = traced(function)
    with torch.no_grad():
        for wanted, found in zip(
            function(*(a.clone() for a in arguments)),
            compiled(*(a.clone() for a in arguments)),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted)
    return nodes


def model(**settings):
    model = tiny(dtype=torch.float32, times=1).requires_grad_(False)
    vps.patch(model, VPSConfig(**settings))
    return model


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_block_selects_once_an_input_and_couples_once(masked):
    sharpened, ids = model(), torch.arange(12).view(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    inputs = {"attention_mask": mask} if masked else {}
    compiled, nodes = traced(sharpened)
    logits = compiled(ids, **inputs).logits
    torch.testing.assert_close(logits, sharpened(ids, **inputs).logits)
    pair, linear = torch.ops.vps.linear_pair.default, torch.ops.vps.linear.default
    assert [node.target for node in nodes] == 2 * [pair, *5 * [linear]]
    # q and k, v, o, gate, up, down
    assert selecting(nodes) == 2 * [True, False, True, True, False, True]
    assert len({given(node)["policy"] for node in nodes}) == 1
    if masked:
        assert len({given(node)["mask"] for node in nodes}) == 1


def test_with_a_gradient():
    sharpened, ids = model(builder="hybrid"), torch.arange(12).view(2, 6)
    embeds = sharpened.get_input_embeddings()(ids)
    gradients = []
    compiled, nodes = traced(sharpened)
    for run in (sharpened, compiled):
        x = embeds.clone().requires_grad_()
        run(inputs_embeds=x).logits.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    couple, linear = torch.ops.vps.couple.default, torch.ops.vps.linear.default
    assert [node.target for node in nodes] == 2 * [couple, *7 * [linear]]
    # the coupling selects for q, k and v, and o, gate, up, down
    assert selecting(nodes) == 2 * [True, False, False, False, True, True, False, True]


def test_an_edit_in_place_is_seen():
    x, W = torch.randn(2, 5, 24), weights(16, 20)
    edits = {
        "all": lambda x: x.mul_(torch.arange(24.0)),
        "a part": lambda x: x[0, :, 3].add_(9),
        "a view": lambda x: x.view(-1)[7:9].fill_(50),
        "data": lambda x: x.copy_(x.flip(-1)),
    }
    for name, edit in edits.items():
        torch.compiler.reset()
        nodes = check(lambda x, first, second, e=edit: two_layers(x, first, second, e), x, *W)
        assert selecting(nodes) == [True, True], name
    assert selecting(check(two_layers, x, *W)) == [True, False]


def test_an_edit_of_an_output_is_not():
    """What is shared is the value that was returned, whatever became of the tensor."""

    def twice(x, W):
        first = vps_linear(x, W)
        first.mul_(3)
        return first, vps_linear(x, W)

    assert len(check(twice, torch.randn(2, 5, 24), *weights(16))) == 1


def test_another_mask_selects_anew():
    def masked(x, mask, other, first, second, third):
        return (
            vps_linear(x, first, mask=mask),
            vps_linear(x, second, mask=other),
            vps_linear(x, third, mask=mask),
        )

    mask = torch.rand(2, 5) < 0.5
    nodes = check(masked, torch.randn(2, 5, 24), mask, ~mask, *weights(16, 20, 12))
    assert selecting(nodes) == [True, True, False]


@pytest.mark.parametrize("ranks", [(4, 2), (2, 4)])
def test_a_part_of_a_selection_is_one(ranks):
    def ranked(x, first, second):
        return tuple(
            vps_linear(x, W, config=VPSConfig(rank=r, adaptive_rank=False))
            for W, r in zip((first, second), ranks, strict=True)
        )

    nodes = check(ranked, torch.randn(2, 5, 24), *weights(16, 20))
    assert selecting(nodes) == [True, ranks[0] < ranks[1]]


def test_drawn_features_are_no_selection():
    def drawn(x, first, second):
        config = VPSConfig(builder="random", seed=3)
        return vps_linear(x, first, config=config), vps_linear(x, second)

    assert selecting(check(drawn, torch.randn(2, 5, 24), *weights(16, 20))) == [False, True]


@pytest.mark.parametrize("answer", [True, False])
def test_a_branch_is_a_graph_of_its_own(answer):
    """What a layer outside, or in the other branch, has selected is no value in it."""

    def branching(x, condition, first, second):
        y = vps_linear(x, first)
        branches = (lambda x: vps_linear(x, second) + 1), (lambda x: vps_linear(x, second) * 2)
        return y, torch.cond(condition, *branches, (x,)), vps_linear(x, second)

    arguments = torch.randn(2, 5, 24), torch.tensor(answer), *weights(16, 20)
    assert selecting(check(branching, *arguments)) == [True, False]


def test_operator():
    arguments = [1.5, -2.0, 2.0**-30], torch.float64, torch.device("cpu")
    torch.library.opcheck(torch.ops.vps.numbers.default, arguments)
    assert torch.ops.vps.numbers(*arguments).tolist() == arguments[0]


def test_exported():
    layers = nn.ModuleList(nn.Linear(24, width) for width in (16, 20))
    for layer in layers:
        layer.requires_grad_(False)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return tuple(layer(x) for layer in self.layers)

    module = Both()
    vps.patch(module, VPSConfig(target_modules="all-linear"))
    x = torch.randn(2, 5, 24)
    for strict in (False, True):
        program = torch.export.export(module, (x,), strict=strict).run_decompositions({})
        nodes = [n for n in program.graph.nodes if n.target is torch.ops.vps.linear.default]
        assert selecting(nodes) == [True, False]
        other = torch.randn(2, 5, 24)
        for found, wanted in zip(program.module()(other), module(other), strict=True):
            torch.testing.assert_close(found, wanted)
