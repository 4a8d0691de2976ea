"""VPSConfig: defaults of SPEC §5, checks and JSON."""

import json

import pytest

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


def test_json_is_read_with_care():
    """As for every file that people write: a byte-order mark, keys given twice, deep nesting."""
    assert VPSConfig.from_json("\ufeff" + VPSConfig(rank=3).to_json()) == VPSConfig(rank=3)
    for text, message in (
        ('{"rank": 1, "rank": 3}', "VPSConfig.from_json: the key 'rank' comes twice"),
        ("[" * 100_000, "VPSConfig.from_json: not valid JSON: nested too deeply"),
    ):
        with pytest.raises(ValueError, match=message):
            VPSConfig.from_json(text)
