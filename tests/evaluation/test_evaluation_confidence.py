"""Confidence-filtered comparison: selection, null variants and what they give away."""

import json
import random
import re

import numpy
import pytest

from vps.evaluation.confidence import Null, confidence_filtered
from vps.evaluation.paired import Outcome


def outcomes(margins, metric="acc", task="t"):
    return [
        Outcome(task, str(number), metric, float(margin > 0), float(margin))
        for number, margin in enumerate(margins)
    ]


def drawn(seed, shift=0.0, size=240, noise=0.5):
    """True margins, and two looks at them: the second moved by ``shift``."""
    generator = numpy.random.default_rng(seed)
    truth = generator.normal(0.3, 1.0, size)
    looks = [truth + generator.normal(0, noise, size) for _ in range(2)]
    return outcomes(looks[0]), outcomes(looks[1] + shift)


@pytest.mark.parametrize("order", ["hardest", "uncertain"])
def test_selection_and_counts(order):
    before = [0.5, -0.1, 2.0, -3.0, 0.2, -0.6]
    after = [-0.5, 0.1, 2.0, -3.0, 0.3, 0.1]
    variant = outcomes(after)
    random.Random(0).shuffle(variant)
    found = confidence_filtered(outcomes(before), variant, 3, order=order, resamples=50)
    kept = {"hardest": ["3", "5", "1"], "uncertain": ["1", "4", "0"]}[order]
    assert found.documents == tuple(("t", document) for document in kept)
    selected = found.selected
    if order == "hardest":
        assert (selected.baseline, selected.variant) == (0, pytest.approx(2 / 3))
        assert (selected.gained, selected.lost) == (2, 0)
    else:
        assert (selected.gained, selected.lost, selected.difference) == (1, 1, 0)
    assert (found.whole.gained, found.whole.lost) == (2, 1)
    assert found.whole.difference == pytest.approx(1 / 6)
    # Means of both margins: 0, 0, 2, -3, .25, -.25; equal ones in the order of the pool.
    by_mean = found.by_mean
    assert (by_mean.gained, by_mean.lost) == (1, 1)


def test_a_change_without_direction_seems_to_help():
    """Two looks at the same truth: the second gains on what the first found hard, the first on what
    the second found hard, and neither on what both did."""
    found = [
        confidence_filtered(*drawn(seed), 80, order="hardest", resamples=200) for seed in range(40)
    ]
    for attribute, low, high in (
        ("selected", 0.02, 1),
        ("by_variant", -1, -0.02),
        ("by_mean", -0.02, 0.02),
        ("whole", -0.02, 0.02),
    ):
        average = numpy.mean([getattr(each, attribute).difference for each in found])
        assert low < average < high, (attribute, average)
    nulls = [each.swap for each in found]
    expected = numpy.mean([each.selected.difference for each in found])
    assert numpy.mean([null.mean for null in nulls]) == pytest.approx(expected, abs=0.01)
    assert all(null.interval[0] <= null.mean <= null.interval[1] for null in nulls)


def test_a_change_that_adds_noise_seems_to_help_the_hardest():
    generator = numpy.random.default_rng(0)
    found = []
    for _ in range(40):
        margins = generator.normal(0.3, 1.0, 240)
        change = generator.normal(0, 0.7, 240)
        before, after = outcomes(margins), outcomes(margins + change)
        found.append(confidence_filtered(before, after, 80, order="hardest", resamples=200))
    observed = numpy.mean([each.selected.difference for each in found])
    assert observed > 0.1
    assert numpy.mean([each.flip.mean for each in found]) == pytest.approx(observed, abs=0.02)
    assert sum(each.flip.p_value <= 0.05 for each in found) <= 6


def test_p_values_of_no_effect_are_not_small_and_those_of_an_effect_are():
    def small(shift):
        runs = (
            confidence_filtered(*drawn(seed, shift), 80, order="hardest", resamples=200)
            for seed in range(60)
        )
        return sum(each.swap.p_value <= 0.05 for each in runs) / 60

    assert small(0.0) < 0.13  # 0.05 is expected
    assert small(1.0) > 0.95


def test_equal_variants_show_nothing():
    before, _ = drawn(0)
    found = confidence_filtered(before, before, 80, resamples=100)
    assert found.selected.difference == 0
    assert found.swap == found.flip == Null(0.0, (0.0, 0.0), 1.0)


def test_a_seed_settles_the_null():
    before, after = drawn(1)
    runs = [confidence_filtered(before, after, 80, resamples=99, seed=s) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_text_and_values():
    found = confidence_filtered(*drawn(2), 80, resamples=99)
    values = json.loads(json.dumps(found.as_dict()))
    assert values["selected"]["difference"] == found.selected.difference
    assert values["kept"] == 80 and values["pool"] == 240 and len(values["documents"]) == 80
    text = str(found)
    assert "80 uncertain of 240 documents" in text
    assert f"{100 * found.selected.difference:+6.1f} points" in text
    assert re.search(rf"swap +{re.escape(f'{100 * found.swap.mean:+.1f}')} points", text)
    assert f"p = {found.flip.p_value:.3g}" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(n=0), "n must be 1 to 4, the size of the pool, got 0"),
        (dict(n=5), "n must be 1 to 4"),
        (dict(order="easy"), "order must be one of uncertain, hardest, got 'easy'"),
        (dict(resamples=0), "resamples must be an integer ≥ 1, got 0"),
        (dict(baseline=[]), "baseline must be outcomes of one metric, got none"),
        (
            dict(variant=outcomes([1, 2]) + outcomes([1, 2], "acc_norm")),
            "variant must be outcomes of one metric, got acc, acc_norm",
        ),
        (dict(variant=outcomes([1, 2, 3])), "documents of the baseline, 1 are in one of them only"),
        (dict(variant=outcomes([1, 2, 3, 4]) * 2), "variant, document '0' of 't' comes twice"),
        (
            dict(baseline=[Outcome("t", "0", "acc", 1.0)]),
            "baseline, document '0' of 't' must have a finite margin, got None",
        ),
        (
            dict(baseline=[Outcome("t", "0", "acc", 1.0, -2.0)]),
            "value of 1 where its margin is positive and 0 where not, got 1.0 and -2.0",
        ),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = dict(baseline=outcomes([1, -1, 2, 3]), variant=outcomes([1, 1, 2, 3]), n=2) | change
    with pytest.raises(ValueError, match=message):
        confidence_filtered(**arguments)
