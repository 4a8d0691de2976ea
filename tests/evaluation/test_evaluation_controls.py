"""Controls: what they compute, that a seed settles it, and that they leave no trace."""

import pytest
import torch
import torch.nn.functional as F
from evaluation_cases import CONFIG, NOTHING, patched_model
from tiny import TARGETS, tiny

import vps
from vps import VPSConfig, reference
from vps.evaluation.controls import CONTROLS, control
from vps.model.patching import sharpened_layers

GUIDED = [name for name in CONTROLS if name != "baseline"]
IDS = torch.tensor([[5, 9, 20, 33, 7, 41], [8, 3, 60, 60, 12, 0]])
MASK = torch.tensor([[1] * 6, [1] * 5 + [0]])


def logits(model, **options):
    with torch.no_grad():
        return model(IDS, attention_mask=MASK, **options).logits


def recorded(model, run=logits):
    """``{name: (x, y)}`` of every sharpened layer in one pass."""
    seen = {}
    handles = [
        layer.register_forward_hook(
            lambda layer, args, y, name=name: seen.update({name: (args[0], y)})
        )
        for name, layer in sharpened_layers(model).items()
    ]
    run(model)
    for handle in handles:
        handle.remove()
    return seen


def gpt2():
    model = tiny("gpt2", times=1)
    vps.patch(model, CONFIG.replace(target_modules=TARGETS["gpt2"]))
    return model


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("builder", ["sk", "sc", "random"])
def test_controls_change_the_model_and_leave_no_trace(name, builder):
    model = patched_model(config=CONFIG.replace(builder=builder))
    before = logits(model)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with control(model, name):
        inside = logits(model)
        with vps.disabled(model):
            plain = logits(model)
    with pytest.raises(KeyError), control(model, name):
        logits(model)
        raise KeyError
    assert torch.isfinite(inside).all()
    assert (inside - before).norm() > 1e-3 * (before - plain).norm()
    assert torch.equal(logits(model), before)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with vps.disabled(model):
        assert torch.equal(logits(model), plain)
    if name == "baseline":
        assert torch.equal(inside, plain)


@pytest.mark.parametrize("name", GUIDED)
def test_a_seed_settles_what_is_drawn(name):
    model = patched_model()
    runs = []
    for seed in (3, 3, 4):
        with control(model, name, seed):
            runs.append(logits(model))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("name", CONTROLS)
def test_nothing_happens_where_gamma_is_zero(name):
    model = patched_model(config=NOTHING)
    expected = logits(model)
    with control(model, name):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", GUIDED)
def test_controls_are_causal_under_the_token_scope(name):
    model = patched_model(torch.float64, VPSConfig(scope="token"))
    ids = IDS[:1]
    with control(model, name, 1), torch.no_grad():
        whole = model(ids).logits
        for length in range(1, ids.shape[1]):
            torch.testing.assert_close(
                model(ids[:, :length]).logits, whole[:, :length], rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_batch_mates_and_padding_have_no_say(name, scope):
    model = patched_model(torch.float64, VPSConfig(scope=scope))
    with control(model, name, 1), torch.no_grad():
        together = model(IDS, attention_mask=MASK).logits
        torch.testing.assert_close(model(IDS[:1]).logits, together[:1], rtol=1e-5, atol=1e-5)
        alone = model(IDS[1:, :5]).logits
        torch.testing.assert_close(alone, together[1:, :5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make", [lambda: patched_model(torch.float64), gpt2], ids=["llama", "gpt2"]
)
@pytest.mark.parametrize("scope", ["token", "sequence", "batch"])
def test_noise_has_the_norm_of_the_update(make, scope):
    """In every layer, query and key among them, for the counted tokens of every group."""
    model = make()
    config = next(iter(sharpened_layers(model).values())).config
    vps.set_config(model, config.replace(scope=scope, rank=2))
    with control(model, "random_noise"):
        noisy = recorded(model)
    for name, layer in sharpened_layers(model).items():
        x, y = noisy[name]
        plain = F.linear(x, layer.matrix(), layer.bias)
        with vps.token_mask(MASK.bool()):  # the layer's own update for this x
            if layer.coupling is None:
                own = layer(x)
            else:
                own = layer.coupling.sharpen(layer, x)
        noise, update = y - plain, own - plain
        if scope == "sequence":
            counted = MASK.bool().unsqueeze(-1)
            noise, update = (z.masked_fill(~counted, 0.0) for z in (noise, update))
        if scope == "batch":
            counted = MASK.bool().unsqueeze(-1)
            noise, update = (z.masked_fill(~counted, 0.0).flatten(0, 1) for z in (noise, update))
        dims = -1 if scope == "token" else (-2, -1)
        sizes = [torch.linalg.vector_norm(z, dim=dims) for z in (noise, update)]
        if scope == "token":
            sizes = [size[MASK.bool()] for size in sizes]
        assert (sizes[1] > 0).all(), name
        torch.testing.assert_close(*sizes, rtol=1e-6, atol=0)
        flat = (noise if scope != "batch" else noise.unsqueeze(0)).flatten(0, 1)
        assert torch.linalg.matrix_rank(flat, rtol=1e-9) <= 2
        similarity = F.cosine_similarity(noise.flatten(), update.flatten(), dim=0)
        assert abs(similarity) < 0.6, name


def test_noise_survives_a_broken_token():
    model = patched_model(torch.float64, CONFIG.replace(scope="sequence"), layers=1)
    layer = sharpened_layers(model)["model.layers.0.mlp.down_proj"]
    x = torch.randn(1, 4, 48, dtype=torch.float64)
    x[0, 0, 0] = float("nan")
    with control(model, "random_noise"):
        y = layer(x)[0, 1:]
    plain = F.linear(x, layer.weight)[0, 1:]
    own = layer(x)[0, 1:]
    assert torch.isfinite(y).all() and not torch.equal(y, plain)
    assert (y - plain).norm() < 10 * (own - plain).norm()


def test_random_indices_differ_between_layers():
    """Each layer is one with the random builder and a seed of its own."""
    model = patched_model(torch.float64)
    with control(model, "random_indices", 5):
        configs = {name: layer.config for name, layer in sharpened_layers(model).items()}
        seen = recorded(model)
    assert len({config.seed for config in configs.values()}) == len(configs) == 14
    for name, layer in sharpened_layers(model).items():
        assert configs[name] == layer.config.replace(builder="random", seed=configs[name].seed)
        x, y = seen[name]
        expected = vps.vps_linear(x, layer.weight, None, configs[name], mask=MASK.bool())
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("builder", ["sk", "sc"])
@pytest.mark.parametrize("coupled", [True, False])
def test_a_donor_of_its_own_gives_the_layer_itself(monkeypatch, builder, coupled):
    """With every layer for its own donor the shuffle is the sharpened model."""
    config = VPSConfig(builder=builder, qk_coupling=coupled, order=2, clip="spectral")
    model = patched_model(torch.float64, config)
    expected = logits(model)
    monkeypatch.setattr(
        "vps.evaluation.controls._donors", lambda layers, seed: {name: name for name in layers}
    )
    with control(model, "shuffled_selection"):
        torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)


def test_shuffled_layers_use_the_selection_of_another(monkeypatch):
    """The update by its definition, with the features that the reference selects in the donor."""
    config = CONFIG.replace(scope="sequence", rank=2, tau=None, qk_coupling=False)
    model = patched_model(torch.float64, config)
    q, o = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
    monkeypatch.setattr("vps.evaluation.controls._donors", lambda layers, seed: {o: q})
    with control(model, "shuffled_selection", 7):
        seen = recorded(model)
    donor, layer = (sharpened_layers(model)[name] for name in (q, o))
    x, _ = seen[q]
    own = reference.vps_linear(x[:1], donor.weight, config=config)
    x, y = seen[o]
    W = layer.weight.detach()
    I_in, I_out = (pool[:2].tolist() for pool in (own.groups[0].I_in, own.groups[0].I_out))
    H = x[:1] @ W.T
    update = config.gamma * H[..., I_out] @ W[:, I_in].T
    torch.testing.assert_close(y[:1], H + update, rtol=0, atol=1e-12)
    kept = reference.vps_linear(x[:1], W, config=config)
    assert not torch.allclose(y[:1], kept.y, atol=1e-6)


def test_donors_come_earlier_and_have_the_shape():
    from vps.evaluation.controls import _donors

    layers = sharpened_layers(patched_model(layers=3))
    order = list(layers)
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    seen = set()
    for seed in range(20):
        donors = _donors(layers, seed)
        assert len(donors) == len(layers) - len(set(shapes.values()))
        for name, donor in donors.items():
            assert order.index(donor) < order.index(name) and shapes[donor] == shapes[name]
        seen.add(tuple(donors.values()))
    assert len(seen) > 10


def test_mistakes_are_named():
    model = patched_model(layers=1)
    with pytest.raises(ValueError, match="must be 'sharpened' or one of baseline, .* got 'none'"):
        control(model, "none")
    vps.unpatch(model)
    for name in ("sharpened", *CONTROLS):
        with pytest.raises(ValueError, match=r"no sharpened layer; call vps\.patch"):
            control(model, name)
    vps.patch(model)
    with (
        pytest.raises(RuntimeError, match="outside torch.autocast"),
        control(model, "shuffled_selection"),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        logits(model)
