"""The flow in float64 against the reference, of every kind of weight and all a layer may hold."""

import pytest
import torch
from cases import (
    columns_of,
    coupled_case,
    drawn_gamma,
    memory_of,
    pairs_of,
    random_case,
    reference_of,
    reference_of_pair,
    relative_error,
    sharpened,
    sharpened_pair,
)
from opaque_cases import Block, applied, opaque

import vps
from vps import VPSConfig
from vps.algorithm.policy import LayerGamma
from vps.layers.opaque_layer import sharpened_by


def by_weight(case, memory, gamma):
    return sharpened(case, memory=memory, gamma=gamma)


def by_forward(case, memory, gamma):
    """A layer that is known by its forward alone."""
    state, gradient = case["state"], case["gradient"]
    model = opaque(
        case["W"], case["b"], case["config"], state=state, gradient=gradient, memory=memory
    )
    sharpened_by(model[0]).gamma = None if gamma is None else LayerGamma(gamma)
    with torch.no_grad():
        return applied(model, case)


@pytest.mark.parametrize(
    ("apply", "memory", "own", "count", "bound"),
    [
        (by_weight, False, False, 400, 1e-12),
        (by_weight, False, True, 300, 1e-10),
        (by_weight, True, False, 200, 1e-11),
        (by_weight, True, True, 100, 1e-9),
        (by_forward, False, False, 400, 1e-10),
        (by_forward, True, True, 100, 1e-9),
    ],
)
def test_one_layer(apply, memory, own, count, bound):
    for seed in range(count):
        case = random_case(seed)
        W = case["W"]
        pairs = pairs_of(seed, len(W)) if memory else []
        gamma = drawn_gamma(seed, columns_of(case, W)) if own else None
        y = apply(case, memory_of(pairs, len(W)) if memory else None, gamma)
        assert relative_error(y, reference_of(case, memory=pairs, gamma=gamma).y) <= bound, seed


def test_the_grid_reaches_every_setting():
    cases = [random_case(seed) for seed in range(400)]
    for field, values in VPSConfig.CHOICES.items():
        drawn = {getattr(case["config"], field) for case in cases}
        assert drawn == set(values) - {"prompt"}  # that scope is in test_fixed.py
    assert any(case["mask"] is not None and not case["mask"].any() for case in cases)


def test_pairs():
    seen = set()
    for seed in range(300):
        case = coupled_case(seed)
        for y, expected in zip(sharpened_pair(case), reference_of_pair(case), strict=True):
            assert relative_error(y, expected.y) <= 1e-10, seed
        config = case["config"]
        coupled = config.builder == "sc" or (config.builder == "hybrid" and case["gradient"])
        seen.add((coupled, config.order, bool(case["memories"][0])))
    assert len(seen) == 8  # SC or not, both orders, memory or not


@pytest.mark.parametrize("hidden", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("first", ["q_proj", "k_proj"])
@torch.no_grad()
def test_pairs_of_which_one_or_both_are_known_by_their_forward(hidden, first):
    """Whichever is called first."""
    for seed in range(60):
        case = coupled_case(seed)
        block = Block(case, hidden, first)
        report = vps.patch(block, case["config"].replace(target_modules=["q_proj", "k_proj"]))
        assert report.coupled == ("",)
        for index, name in enumerate(("q_proj", "k_proj")):
            layer = sharpened_by(getattr(block, name))
            layer.state, layer.gradient = case["state"], (case["gradient"], True)[index]
            layer.memory = memory_of(case["memories"][index], len(case["weights"][index]))
        for y, expected in zip(applied(block, case), reference_of_pair(case), strict=True):
            assert relative_error(y, expected.y) <= 1e-10, seed
