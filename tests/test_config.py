"""VPSConfig: defaults of SPEC §5, checks and JSON."""

import copy
import dataclasses
import json
import pickle
import warnings

import pytest
import torch

import vps
from vps import VPSConfig


def test_defaults_are_those_of_the_specification():
    config = VPSConfig()
    assert (config.rank, config.rank_bounds, config.adaptive_rank) == (2, (1, 4), True)
    assert (config.topk, config.topk_bounds, config.adaptive_topk) == (32, (16, 64), True)
    assert (config.gamma, config.gamma_bounds, config.adaptive_gamma) == (0.5, (0.3, 0.8), True)
    assert (config.order, config.order_bounds, config.adaptive_order) == (1, (1, 2), False)
    assert (config.tau, config.alpha, config.clamp, config.clip) == (0.8, 1e-3, None, "component")
    assert (config.builder, config.scope) == ("hybrid", "sequence")
    assert config.qk_coupling and config.lbfgs
    assert " ".join(config.target_modules) == (
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0), ("rank", 2.0), ("rank", True), ("topk", 65), ("gamma", -0.1),
        ("gamma", float("nan")), ("gamma", "0.5"), ("tau", 0), ("alpha", 0), ("clamp", -1),
        ("builder", "sl"), ("scope", "tokens"), ("clip", None), ("order", 3), ("seed", -1),
        ("rank_bounds", (4, 1)), ("rank_bounds", 4), ("gamma_bounds", (0.1, float("inf"))),
        ("topk_bounds", (0, 4)), ("adaptive_rank", 1), ("target_modules", ()),
        ("target_modules", ""), ("target_modules", "("), ("target_modules", [1]),
        ("exclude_modules", []), ("layers_to_transform", []), ("layers_to_transform", [-1]),
    ],
)  # fmt: skip
def test_bad_values_name_field_and_value(field, value):
    with pytest.raises((ValueError, TypeError), match=f"VPSConfig.{field}|layers_to_transform"):
        VPSConfig(**{field: value})


def test_json_round_trip_and_errors():
    config = VPSConfig(gamma=0.1, rank_bounds=(2, 3), target_modules=["a", "b"], tau=None)
    assert VPSConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="not valid JSON"):
        VPSConfig.from_json(config.to_json()[:40])
    with pytest.raises(ValueError, match="expected an object"):
        VPSConfig.from_json("[1]")
    with pytest.raises(ValueError, match="'gama'.*'gamma'"):
        VPSConfig.from_json(json.dumps({"gama": 1}))


def test_replace_checks_and_follows():
    assert VPSConfig().replace(adaptive_rank=False).adaptive_topk is False
    with pytest.raises(TypeError, match="'tua'.*'tau'"):
        VPSConfig().replace(tua=1)
    with pytest.raises(ValueError, match="rank"):
        VPSConfig().replace(rank=99)


def effective(config, d=8):
    """The output of a layer of d features, and of the plain layer."""
    torch.manual_seed(0)
    layer = vps.VPSLinear(d, d, config=config, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(5, d, dtype=torch.float64)
    with vps.backend("torch"):
        return layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)


@pytest.mark.parametrize(
    ("given", "fixed"),
    [
        ({"gamma": 0.1}, {"adaptive_gamma": False}),
        ({"gamma": 0.5}, {"adaptive_gamma": False}),  # also where it is the value left out
        ({"rank": 3}, {"adaptive_rank": False, "adaptive_topk": False}),
        ({"rank": 2, "gamma": 0.65}, {"adaptive_rank": False, "adaptive_gamma": False}),
        ({"topk": 2}, {"adaptive_topk": False}),
        ({"order": 2}, {"adaptive_order": False}),
    ],
)
def test_a_value_that_is_given_holds(given, fixed):
    """SPEC §5; also through replace, dataclasses.replace and JSON."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = VPSConfig(**given, **fixed)
        ways = [
            VPSConfig(**given),
            VPSConfig().replace(**given),
            VPSConfig.from_json(json.dumps(given)),
            VPSConfig.from_json(VPSConfig(**given).to_json()),
            VPSConfig(scope="token").replace(**given, scope="sequence"),
        ]
        # dataclasses.replace cannot tell a value from the one that is there already.
        if not any(getattr(VPSConfig(), name) == value for name, value in given.items()):
            ways.append(dataclasses.replace(VPSConfig(), **given))
    assert all(config == wanted for config in ways)
    assert all(torch.equal(effective(config)[0], effective(wanted)[0]) for config in ways)


def test_what_is_left_out_stays_adaptive():
    config = VPSConfig(gamma=0.1)
    assert config.adaptive_rank and config.adaptive_topk
    assert VPSConfig(rank=3).adaptive_gamma and not VPSConfig(rank=3).adaptive_topk
    assert VPSConfig(adaptive_gamma=False).gamma == 0.5
    assert VPSConfig(rank=40).topk == 40  # 32 would cut a rank that was given
    assert VPSConfig(adaptive_order=True).adaptive_order and not VPSConfig().adaptive_order


@pytest.mark.parametrize("gamma", [0, 0.0])
def test_gamma_of_0_is_off(gamma):
    y, plain = effective(VPSConfig(gamma=gamma))
    assert torch.equal(y, plain)


def test_what_has_no_effect_is_said_once():
    both = {"gamma": 0.65, "adaptive_gamma": True, "rank": 2, "adaptive_rank": True}
    with pytest.warns(UserWarning) as said:
        config = VPSConfig(**both)
    assert len(said) == 1
    assert "gamma=0.65" in str(said[0].message) and "rank=2" in str(said[0].message)
    assert said[0].filename == __file__
    assert torch.equal(effective(config)[0], effective(VPSConfig())[0])  # the bounds decide
    for make in (
        lambda: VPSConfig(gamma=0.1, gamma_bounds=(0.1, 0.2)),
        lambda: VPSConfig(gamma=0.1).replace(gamma_bounds=(0.1, 0.2)),
        lambda: VPSConfig(order_bounds=(2, 2)),
        lambda: VPSConfig(adaptive_gamma=True).replace(gamma=0.1),
    ):
        with pytest.warns(UserWarning, match="no effect"):
            make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.replace(scope="token")  # said before
        turned = VPSConfig(gamma=0.65).replace(adaptive_gamma=True)
    assert turned == VPSConfig()


def test_files_of_earlier_versions_are_read_as_they_were_meant():
    old = {
        "rank": 2, "adaptive_rank": True, "rank_bounds": [1, 4], "topk": 32, "adaptive_topk": True,
        "topk_bounds": [16, 64], "gamma": 0.5, "adaptive_gamma": True, "gamma_bounds": [0.3, 0.8],
        "order": 1, "adaptive_order": False, "order_bounds": [1, 2],
    }  # fmt: skip
    with pytest.warns(UserWarning) as said:
        assert VPSConfig.from_json(json.dumps(old)) == VPSConfig()
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old |= {"adaptive_rank": False, "adaptive_topk": False, "adaptive_gamma": False}
        assert VPSConfig.from_json(json.dumps(old)) == VPSConfig(rank=2, gamma=0.5)


@pytest.mark.parametrize("given", [{}, {"gamma": 0.1}, {"rank": 3}, {"adaptive_rank": False},
                                   {"rank": 3, "adaptive_topk": True}])  # fmt: skip
def test_copies_of_every_kind_are_equal_and_behave_alike(given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = VPSConfig(**given)
        copies = [
            VPSConfig.from_json(config.to_json()),
            pickle.loads(pickle.dumps(config)),
            copy.deepcopy(config),
            dataclasses.replace(config),
            config.replace(scope="token").replace(scope="sequence"),
        ]
        for each in copies:
            assert each == config and each.to_json() == config.to_json()
            assert each.replace(gamma=0.2) == config.replace(gamma=0.2)
