"""Losses and verdicts of predictions against golds (SPEC §9)."""

import sys

import pytest

from vps import verify
from vps.verify import (
    CompositeVerifier,
    check,
    extract_answer,
    numeric_loss,
    self_consistency_loss,
    units,
    units_loss,
)

pytest.importorskip("sympy")
pytest.importorskip("pint")
pytest.importorskip("math_verify")

PATIENT = 30  # seconds, where a machine has much else to do

VERDICTS = [
    ("The answer is 42.", "6 * 7\n#### 42", "correct"),
    ("It is 41.", "#### 42", "wrong"),
    ("It was 42, now it is 41.", "42", "wrong"),
    (r"\boxed{42}, not 41", "42", "correct"),
    ("1,234.50", "1234.5", "correct"),
    ("$3.50", "3.5", "correct"),
    ("3/4", "0.75", "correct"),
    (r"\frac{3}{4}", "75%", "correct"),
    ("1/3", "0.333", "wrong"),
    ("1e-3", "0.001", "correct"),
    ("2.5 × 10^3", "2500", "correct"),
    ("−5", "-5", "correct"),
    ("5", "-5", "wrong"),
    ("12%", "12", "correct"),
    ("12%", "0.12", "correct"),
    ("12%", "13", "wrong"),
    ("2 km", "2000 m", "correct"),
    ("2000 m", "2 km", "correct"),
    ("2 km", "2 m", "wrong"),
    ("2", "2 km", "wrong"),
    ("2 kg", "2 km", "wrong"),
    ("2 furlongfoos", "2 km", "wrong"),
    ("2 km", "2", "correct"),
    ("5 apples", "5", "correct"),
    ("20 °C", "68 °F", "correct"),
    ("90", "90°", "correct"),
    ("1 kWh", "3.6 MJ", "correct"),
    ("x^2 - 1", "(x-1)(x+1)", "correct"),
    ("It is (x-1)(x+1).", "x^2 - 1", "correct"),
    ("x^2 + 1", "(x-1)(x+1)", "wrong"),
    (r"\boxed{x^{2}-1}", r"\left(x-1\right)\left(x+1\right)", "correct"),
    ("x + y", "y + x", "correct"),
    ("x", "y", "wrong"),
    ("x = 5", "5", "correct"),
    ("5", "x = 5", "correct"),
    ("x = 6", "5", "wrong"),
    ("x = 5", "5 = x", "correct"),
    ("y = 2x + 1", "2x - y + 1 = 0", "correct"),
    ("y = 2x + 1", "y = 2x - 1", "wrong"),
    (r"\boxed{x^2 - 1 = 0}", "0", "wrong"),
    ("f(x) = x^2", "x^2", "correct"),
    ("x > 3", "3 < x", "correct"),
    ("2x > 6", "x > 3", "correct"),
    ("x > 3", "x < 3", "wrong"),
    ("x >= 3", "x > 3", "wrong"),
    (r"\sqrt{8}", r"2\sqrt{2}", "correct"),
    (r"\sqrt{8}", "2.83", "wrong"),
    (r"\sin^2 x + \cos^2 x", "1", "correct"),
    ("e^{i\\pi}", "-1", "correct"),
    ("5^x", r"e^{x \ln 5}", "correct"),
    ("(3, 4)", "(3,4)", "correct"),
    ("(3, 4)", "(4, 3)", "wrong"),
    ("(3, 4)", "4", "wrong"),
    (r"\{1, 2\}", r"\{2, 1\}", "correct"),
    ("[0, 1)", "[0,1)", "correct"),
    ("[0, 1)", "[0, 1]", "wrong"),
    (r"$\binom{5}{2}$", "10", "correct"),
    (r"\binom{5}{2}", "2", "wrong"),
    (r"\boxed{\int_0^1 x\,dx}", "1/2", "correct"),
    (r"\infty", r"\infty", "correct"),
    (r"\infty", "5", "wrong"),
    ("The answer is (B)", "B", "correct"),
    ("A", "B", "wrong"),
    ("The answer is Paris.", "paris", "correct"),
    ("The answer is London.", "Paris", "undecided"),
    ("", "42", "wrong"),
    ("no idea", "42", "wrong"),
    ("42", "", "undecided"),
    ("nan", "nan", "undecided"),
    ("inf", "inf", "undecided"),
    ("nan", "5", "wrong"),
    ("1/0", "1/0", "undecided"),
    (r"\infty - \infty", r"\infty - \infty", "undecided"),
    ("9**9**9**9", "9**9**9**9", "undecided"),
    ("9" * 10**6, "9", "undecided"),
]


@pytest.mark.parametrize("prediction, gold, verdict", VERDICTS, ids=lambda value: repr(value)[:32])
def test_verdict(prediction, gold, verdict):
    assert check(prediction, gold, timeout=PATIENT).value == verdict


def of(loss, prediction, gold, *arguments):
    return loss(extract_answer(prediction), extract_answer(gold), *arguments)


@pytest.mark.parametrize(
    "prediction, gold, loss",
    [
        ("40", "42", 4),
        ("none", "42", 42**2),
        ("none", "0.5", 1),
        ("", "42", 42**2),
        ("40", "Paris", 0),
        ("40", "x + y", 0),
        ("2 km", "2001 m", 1),
        ("2001 m", "2 km", 1e-6),
        ("2 kg", "3 m", 1),
        ("2", "3 m", 1),
        ("12%", "0.13", 1e-4),
        ("1e900", "0", 1e300),
        ("9**9**9**9", "3", 9),
    ],
)
def test_numeric_loss(prediction, gold, loss):
    assert of(numeric_loss, prediction, gold) == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize(
    "prediction, gold, loss",
    [
        ("2 km", "2 m", 0),
        ("2", "2 m", 1),
        ("2 kg", "2 m", 1),
        ("2 m^2", "2 m", 1),
        ("2 foos", "2 m", 1),
        ("2 m", "2 foos", 0),
        ("2 m", "2", 0),
        ("2", "2%", 0),
        ("", "2 m", 1),
        ("none", "2 m", 1),
        ("2 N", "3 kg m/s^2", 0),
        ("2 m**9**9**9", "2 m", 1),
    ],
)
def test_units_loss(prediction, gold, loss):
    assert of(units_loss, prediction, gold) == loss


@pytest.mark.parametrize(
    "samples, loss",
    [
        ([], 1),
        (["5"], 1),
        (["5", "none"], 1),
        (["5", "5", "#### 5"], 0),
        (["4", "6"], 1 / (25 + 1e-6)),
        (["-1", "1"], 1 / 1e-6),
        (["2 km", "2000 m"], 0),
        (["2 km", "2"], 0),
        (["4", "none", "6"], 1 / (25 + 1e-6)),
    ],
)
def test_self_consistency_loss(samples, loss):
    assert self_consistency_loss(samples) == pytest.approx(loss, rel=1e-12)
    assert self_consistency_loss(lambda: iter(samples)) == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("samples", ["5", b"5", 5, ["5", 5], lambda: 5, lambda: ["5", None]])
def test_samples_of_another_type(samples):
    with pytest.raises(TypeError, match="sample"):
        self_consistency_loss(samples)


def test_composite():
    losses = CompositeVerifier(timeout=PATIENT)("3 kg", "2 m", ["4", "6"])
    consistency = 1 / (25 + 1e-6)
    assert losses.parts == {
        "numeric": 1.0,
        "units": 1.0,
        "self_consistency": pytest.approx(consistency),
        "algebraic": 1.0,
    }
    assert losses.total == pytest.approx(1.0 + 0.5 + 0.3 * consistency + 0.2)
    assert losses.undecided == ()
    right = CompositeVerifier(timeout=PATIENT)("x^2 - 1", "(x-1)(x+1)", lambda: ["x", "y"])
    assert right.parts == {"numeric": 0, "units": 0, "self_consistency": 1, "algebraic": 0}


def test_composite_tells_what_was_undecided():
    losses = CompositeVerifier(timeout=PATIENT)("9**9**9**9", "9**9**9**9")
    assert losses.parts["algebraic"] == 1
    assert losses.undecided == ("algebraic",)


def test_composite_without_gold():
    verifier = CompositeVerifier(timeout=PATIENT)
    assert verifier("5").parts == {"units": 0}
    samples = ["5 m", "6 m", "5"]
    assert set(verifier("5 m", samples=samples).parts) == {"units", "self_consistency"}
    assert verifier("5 cm", samples=samples).parts["units"] == 0
    assert verifier("5 kg", samples=samples).parts["units"] == 1
    assert verifier("5 kg", samples=["5 m", "5", "6"]).parts["units"] == 0


def test_composite_takes_some_parts_only():
    losses = CompositeVerifier({"numeric": 2, "units": 0})("40 kg", "42 m")
    assert losses.parts == {"numeric": 4.0, "units": 1.0}
    assert losses.total == 8.0


def test_calls_the_maker_of_samples_once():
    calls = []

    def make():
        calls.append(None)
        return ["1", "2"]

    CompositeVerifier()("1", "1", make)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "weights, error, message",
    [
        ({"numerical": 1.0}, ValueError, "no part is named 'numerical'; parts are numeric, units"),
        ({}, ValueError, "name no part; parts are numeric"),
        ({"numeric": -1}, ValueError, "weight of numeric must be from 0"),
        ({"numeric": float("nan")}, ValueError, "weight of numeric must be from 0"),
        ({"numeric": float("inf")}, ValueError, "weight of numeric must be from 0"),
        ({"numeric": "1"}, TypeError, "weight of numeric must be a number, got str"),
        ({"numeric": True}, TypeError, "weight of numeric must be a number, got bool"),
        ([1, 2], TypeError, "must map names of parts to numbers, got list"),
    ],
)
def test_weights_are_checked(weights, error, message):
    with pytest.raises(error, match=message):
        CompositeVerifier(weights)


@pytest.mark.parametrize(
    "timeout, error",
    [(0, ValueError), (-1, ValueError), (float("nan"), ValueError), (float("inf"), ValueError)]
    + [("2", TypeError), (True, TypeError), (None, TypeError)],
)
def test_timeout_is_checked(timeout, error):
    with pytest.raises(error, match="timeout must be"):
        CompositeVerifier(timeout=timeout)
    with pytest.raises(error, match="timeout must be"):
        check("1", "1", timeout=timeout)


@pytest.mark.parametrize("prediction, gold", [(None, "1"), ("1", 5), (b"1", "1")])
def test_texts_are_checked(prediction, gold):
    with pytest.raises(TypeError, match="text must be a str"):
        check(prediction, gold)
    with pytest.raises(TypeError, match="text must be a str"):
        CompositeVerifier()(prediction, gold)


def test_pint_is_asked_for_only_where_units_differ(monkeypatch):
    monkeypatch.setitem(sys.modules, "pint", None)
    units.registry.cache_clear()
    units.scale.cache_clear()
    try:
        assert check("2 km", "2 km").value == "correct"
        assert check("12%", "0.12").value == "correct"
        with pytest.raises(ImportError, match=r"units needs pint.*vps-kernels\[verify\]"):
            check("2 km", "2000 m")
    finally:
        units.scale.cache_clear()


def test_public_names():
    assert all(hasattr(verify, name) for name in verify.__all__)
