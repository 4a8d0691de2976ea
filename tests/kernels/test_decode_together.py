"""Layers of one x in one launch have the bits of a launch for each."""

import pytest
import torch

pytest.importorskip("triton")
from vps.kernels import tuning
from vps.kernels.decode import decode, gemv

pytestmark = pytest.mark.usefixtures("poison")
BOUNDS = [0.3, 0.8, 1, 4, 32, 32, 1, 1]


def layer(d_out, d_in, dtype, device, bias=True, factors=()):
    W = (torch.randn(d_out, d_in, device=device) / d_in**0.5).to(dtype)
    b = torch.randn(d_out, device=device).to(dtype) if bias else None
    numbers = torch.tensor([1.0, *BOUNDS, *factors], dtype=torch.float64, device=device)
    return decode.Layer(W, b, numbers)


def same(together, alone):
    for one, other in zip(together, alone, strict=True):
        for name, whole, own in zip(one._fields, one, other, strict=True):
            assert torch.equal(whole, own), name
            assert whole.shape == own.shape and whole.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 11])
def test_query_key_and_value(device, dtype, tokens):
    x = torch.randn(tokens, 1, 90, device=device).to(dtype)
    layers = [layer(70, 90, dtype, device), layer(33, 90, dtype, device, bias=False)]
    layers.append(layer(16, 90, dtype, device))
    layers[2] = layers[2]._replace(  # strides of its own
        weight=layers[2].weight.T.contiguous().T, bias=layers[2].bias.repeat_interleave(2)[::2]
    )
    mask = torch.arange(tokens, device=device)[:, None] != 3
    nats = torch.tensor([1.2, 1.3], dtype=torch.float64, device=device)
    I_out = (torch.arange(3 * 4, device=device).view(3, 4) % 16).expand(tokens, 3, 4)
    for rest in (
        (None, None, None, None, 4, True, 0.8, None),
        (mask, None, None, nats, 3, True, 0.1, 0.05),
        (None, None, I_out, None, 4, False, None, None),
    ):
        together = decode.launch(x, layers, *rest)
        alone = []
        for at, one in enumerate(layers):
            own = None if rest[2] is None else rest[2][:, at : at + 1]
            alone += decode.launch(x, [one], *rest[:2], own, *rest[3:])
        same(together, alone)


def test_policies_differ(device):
    x = torch.randn(2, 1, 40, device=device)
    layers = [layer(48, 40, torch.float32, device, factors=[factor] * 4) for factor in (0.5, 2.0)]
    rest = None, None, None, None, 4, True, 0.8, None
    together = decode.launch(x, layers, *rest)
    same(together, [decode.launch(x, [one], *rest)[0] for one in layers])
    assert not torch.equal(together[0].core, together[1].core)


def test_what_one_launch_does_not_take(device):
    """Tiles of two heights, or policies of two lengths; then each layer is launched by itself."""
    x = torch.randn(1, 1, 20, device=device)
    narrow, wide = (layer(width, 20, torch.float32, device) for width in (30, 8200))
    factored = layer(30, 20, torch.float32, device, factors=[1.0, 2.0])
    rest = None, None, None, None, 2, True, 0.8, None
    for layers in ([narrow, wide], [narrow, factored]):
        assert len({decode.kind(one) for one in layers}) == 2
        same(decode.launch(x, layers, *rest), [decode.launch(x, [one], *rest)[0] for one in layers])


@pytest.mark.parametrize("heights", [(16, 16), (16, 32)])
def test_query_and_key_that_select_together(device, heights, monkeypatch):
    """Three launches, or five if the tiles of the two have two heights."""
    x = torch.randn(3, 1, 50, device=device).bfloat16()
    query, key = (layer(width, 50, torch.bfloat16, device) for width in (64, 32))
    monkeypatch.setattr(tuning, "gemv_rows", lambda width: heights[width == 32])
    arguments = None, None, None, None, 4, True, 0.8, None
    results = decode.launch(x, [query, key], *arguments, (4, 2))
    y_q, y_k, I_in = results[0].y, results[1].y, results[0].features[:, 0]
    products = [
        gemv.launch(x, [one.weight], None, I_in, 4, False, False, True) for one in (query, key)
    ]
    energy, features = decode.couple.launch(
        *(product.of(0) for product in products), [], None, I_in, 4, 2
    )
    for at, (y, one, product) in enumerate(zip((y_q, y_k), (query, key), products, strict=True)):
        chosen = [features[:, 1 + at]]
        (own,) = decode.apply.launch(
            I_in, product, [one.bias], None, chosen, energy, [one.policy], None, True, 0.8, None
        )
        assert torch.equal(y, own.y)


def test_the_parts_of_a_product(device):
    x = torch.randn(2, 1, 24, device=device)
    weights = [torch.randn(width, 24, device=device) for width in (5, 40, 17)]
    product = gemv.launch(x, weights, None, None, 1, False, False, False)
    for at, weight in enumerate(weights):
        torch.testing.assert_close(product.of(at), x[:, 0] @ weight.T, rtol=1e-5, atol=1e-5)
    assert product.columns is product.record is product.sums is product.row_squares is None
