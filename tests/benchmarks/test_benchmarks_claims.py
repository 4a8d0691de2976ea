"""The paper's bound on layers with real inputs, against the update that a layer really adds."""

import json
import math

import pytest
import torch
from evaluation_cases import tokenizer
from tiny import tiny

import vps
from benchmarks.reproduce import questions
from benchmarks.study import claims
from vps import VPSConfig
from vps.model.patching import sharpened_layers


@pytest.fixture(scope="module")
def model():
    """A patched model of characters, in float64."""
    made = tiny(vocab_size=99, max_position_embeddings=256)
    vps.patch(made, VPSConfig())
    return made


def test_norm_is_that_of_the_update_that_a_layer_adds(model):
    """Of every layer, from its output for each input by itself with the prompt's decision held."""
    ids = torch.randint(3, 99, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    config = VPSConfig(rank=3, scope="prompt")
    found = {each.layer: each for each in claims.updates(model, config, [ids])}
    layers = sharpened_layers(model)
    assert found.keys() == layers.keys()
    vps.set_config(model, config)
    try:
        for name, result in claims.groups(model, ids, ()):
            (group,) = result.groups
            W = layers[name].weight.detach()
            whole = W @ group.U @ torch.diag(1 / group.scale) @ group.V.T @ W
            size = torch.linalg.matrix_norm(whole, ord=2)
            assert found[name].norm == pytest.approx(float(size), rel=1e-9)
            moved = (result.y - result.H.view_as(result.y)).norm() / result.H.norm()
            assert found[name].relative == pytest.approx(float(moved), rel=1e-9)
    finally:
        vps.set_config(model, VPSConfig())


def test_what_is_computed_is_what_the_model_computes(model):
    """The literal results are the outputs of the layers in the pass itself, coupled ones too."""
    ids, outputs = list(range(5, 14)), {}
    layers = sharpened_layers(model)
    handles = [
        layer.register_forward_hook(lambda m, args, y, name=name: outputs.update({name: y}))
        for name, layer in layers.items()
    ]
    try:
        literal = dict(claims.groups(model, ids, ()))
    finally:
        for handle in handles:
            handle.remove()
    assert layers[next(name for name in layers if name.endswith("q_proj"))].is_coupled()
    for name, y in outputs.items():
        torch.testing.assert_close(literal[name].y, y, rtol=1e-9, atol=1e-9)


def test_violations_are_counted():
    """Two equal columns: 2τ is above √2·τ, and equals r·τ."""

    def update(norm, rank, layer="a"):
        return claims.Update(layer, rank, norm, norm, True, 0.5, 0.5, 0.1, ((0,), (1,)))

    found = claims.summary([update(1.6, 2), update(0.8, 1), update(0.8, 2, "b")], 0.8)
    assert (found["above √r·τ"], found["layers above √r·τ"], found["above r·τ"]) == (1, 1, 0)
    assert found["largest over √r·τ"] == pytest.approx(math.sqrt(2), abs=1e-4)
    assert found["groups of rank above 1"] == 2 and found["ranks"] == {"1": 1, "2": 2}


def test_constancy():
    def layer(*features):
        return [claims.Update("a", 1, 1, 1, True, 0.5, 0.5, 0.1, ((i,), (0,))) for i in features]

    assert claims.constancy({"a": layer(3, 3, 3, 3)}, 0) == 1
    assert claims.constancy({"a": layer(1, 2, 3, 3)}, 0) == 0.5


def test_all_claims_on_a_tiny_model(model, monkeypatch):
    drawn = [
        {"question": f"{i} + {i}", "answer": str(2 * i), "choices": [str(2 * i), "3"], "gold": 0}
        for i in range(4, 6)
    ]
    monkeypatch.setattr(questions, "questions", lambda kind, count, pilot: drawn[:count])
    monkeypatch.setattr(
        questions, "prose", lambda kind, count, tokenizer, length: [list(range(3, 15))] * count
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = json.loads(json.dumps(claims.check(model, tokenizer(), 1, 2)))
    assert {"cpu", "instructions", "commit", "torch"} <= found["facts"].keys()
    assert found["settings"]["texts"] == 3 + len(questions.PROSE)
    assert found["updates"].keys() == claims.CONFIGS.keys()
    for name, kinds in found["updates"].items():
        every = kinds["all"]
        assert len(kinds) == 8 and every["layers"] == 14
        assert every["groups"] == 14 * 7 * (1 if name.endswith("prompt") else claims.TOKENS)
        assert every["above r·τ"] == 0 and every["largest over r·τ"] > 0
        assert (
            sum(own["groups"] for kind, own in kinds.items() if kind != "all") == (every["groups"])
        )
    assert found["L-BFGS"]["questions"] == 6
    assert found["L-BFGS"]["with a pair"] <= 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
