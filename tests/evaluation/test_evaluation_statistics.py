"""The paired statistics against brute force: enumeration, simulation and textbook formulas."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats

from vps.evaluation import paired


@pytest.mark.parametrize("gained", range(0, 9))
@pytest.mark.parametrize("lost", range(0, 9))
def test_mcnemar_is_the_sum_over_all_flips(gained, lost):
    """p = share of the 2^d equally likely signs at least as lopsided as the one seen."""
    d = gained + lost
    signs = itertools.product((0, 1), repeat=min(d, 12))
    if d <= 12:
        extreme = [abs(2 * sum(s) - d) >= abs(gained - lost) for s in signs]
        assert paired.mcnemar(gained, lost) == pytest.approx(sum(extreme) / len(extreme))
    else:
        tail = sum(math.comb(d, k) for k in range(min(gained, lost) + 1)) / 2**d
        assert paired.mcnemar(gained, lost) == pytest.approx(min(1, 2 * tail))
    assert paired.mcnemar(gained, lost) == paired.mcnemar(lost, gained)


def test_mcnemar_of_the_author():
    """Six to right and four to wrong of 80: the paper's only result says nothing."""
    assert paired.mcnemar(6, 4) == pytest.approx(0.7539, abs=1e-4)
    with pytest.raises(ValueError, match="lost is -1, expected at least 0"):
        paired.mcnemar(1, -1)


def holm_by_definition(p):
    """Reject, from the smallest p on, while p ≤ level/(m − rank): the least level that rejects."""
    found = []
    for i in range(len(p)):
        order = sorted(range(len(p)), key=lambda j: p[j])
        needed = 0.0
        for rank, j in enumerate(order):
            needed = max(needed, p[j] * (len(p) - rank))
            if j == i:
                break
        found.append(min(1.0, needed))
    return found


def test_holm():
    draw = random.Random(0)
    for m in (1, 2, 3, 7, 40):
        for _ in range(30):
            p = [draw.choice((draw.random() ** 4, draw.random())) for _ in range(m)]
            corrected = paired.holm(p)
            assert corrected == pytest.approx(holm_by_definition(p))
            assert all(q >= raw for q, raw in zip(corrected, p, strict=True))
            bonferroni = [min(1, m * raw) for raw in p]
            assert all(q <= b + 1e-15 for q, b in zip(corrected, bonferroni, strict=True))
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([]) == []
    with pytest.raises(ValueError, match=r"p is nan, expected 0 to 1"):
        paired.holm([0.5, math.nan])


def test_holm_keeps_its_promise():
    """Over null grids, a false alarm anywhere is no likelier than 5 %; uncorrected it is."""
    draw = np.random.default_rng(1)
    alarms = careless = 0
    for _ in range(400):
        p = [paired.mcnemar(*draw.multinomial(60, [0.5, 0.5])) for _ in range(12)]
        alarms += min(paired.holm(p)) < 0.05
        careless += min(p) < 0.05
    assert alarms / 400 < 0.08 and careless / 400 > 0.2


def test_interval_is_the_distribution_of_resampled_means():
    """For 5 documents all 5^5 samples can be listed; their percentiles are the interval."""
    d = np.array([1.0, 0.0, -1.0, 0.5, 2.0])
    w = np.array([1.0, 3.0, 2.0, 1.0, 0.5])
    every = np.array(list(itertools.product(range(5), repeat=5)))
    means = (d * w)[every].sum(1) / w[every].sum(1)
    low, high = paired.difference_interval(d, w, resamples=40000)
    assert low == pytest.approx(np.percentile(means, 2.5), abs=0.02)
    assert high == pytest.approx(np.percentile(means, 97.5), abs=0.02)
    assert (low, high) == paired.difference_interval(d, w, resamples=40000)


def test_interval_draws_within_tasks():
    """Where documents of a task agree, all that is left to vary is nothing."""
    d = np.array([1.0] * 30 + [0.0] * 10)
    tasks = ["a"] * 30 + ["b"] * 10
    assert paired.difference_interval(d, groups=tasks) == (0.75, 0.75)
    low, high = paired.difference_interval(d)
    assert low < 0.7 and high > 0.8
    singles = paired.difference_interval([1.0, 0.0, 1.0], groups=["a", "a", "alone"])
    assert singles == pytest.approx((1 / 3, 1.0))


def test_interval_covers():
    draw = np.random.default_rng(2)
    hits = 0
    for seed in range(200):
        d = draw.choice([-1, 0, 1], p=[0.1, 0.7, 0.2], size=120)
        low, high = paired.difference_interval(d, resamples=400, seed=seed)
        hits += low <= 0.1 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_interval_of_too_little():
    assert paired.difference_interval([0.0, 0.0]) == (0.0, 0.0)
    assert all(map(math.isnan, paired.difference_interval([1.0])))
    with pytest.raises(ValueError, match="1 groups for 2 differences"):
        paired.difference_interval([1.0, 0.0], groups=["a"])
    with pytest.raises(ValueError, match="shape .2,. and weights of shape .3,."):
        paired.difference_interval([1.0, 0.0], [1, 1, 1])
    with pytest.raises(ValueError, match="finite values and positive weights"):
        paired.difference_interval([1.0, 0.0], [1, 0])


def test_paired_t_against_sign_flips():
    """The exact test by all 2^n signs, to which the t-test is an approximation."""
    draw = np.random.default_rng(3)
    for shift in (0.0, 0.3, 0.6):
        terms = draw.normal(shift, 1, 14)
        w = draw.uniform(0.5, 2, 14)
        signs = np.array(list(itertools.product((-1, 1), repeat=14)))
        exact = (np.abs(signs @ (terms * w)) >= abs((terms * w).sum()) - 1e-12).mean()
        assert paired.paired_t(terms, w) == pytest.approx(exact, abs=0.01 + 0.05 * exact)
    assert paired.paired_t([0.0, 0.0, 0.0]) == 1.0
    assert paired.paired_t([0.1, 0.1, 0.1]) == 0.0
    assert paired.paired_t([5.0]) == 1.0


def simulated_power(n, discordance, effect, alpha, draw, times=4000):
    gain, loss = (discordance + effect) / 2, (discordance - effect) / 2
    counts = draw.multinomial(n, [gain, loss, 1 - gain - loss], size=times)
    table = {}
    rejected = 0
    for gained, lost, _ in counts.tolist():
        if (gained, lost) not in table:
            table[gained, lost] = paired.mcnemar(gained, lost) <= alpha
        rejected += table[gained, lost]
    return rejected / times


@pytest.mark.parametrize("n", [40, 200, 1000])
@pytest.mark.parametrize("discordance", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 60])
def test_minimum_detectable_effect_is_found_as_often_as_it_says(n, discordance, alpha):
    effect = paired.minimum_detectable_effect(n, discordance, alpha)
    draw = np.random.default_rng(4)
    share = max(effect, discordance)
    assert simulated_power(n, share, effect, alpha, draw) == pytest.approx(0.8, abs=0.03)
    exact = paired.mcnemar_power(n, share, effect, alpha)
    assert exact == pytest.approx(0.8, abs=1e-3)
    assert paired.mcnemar_power(n, share, 0.8 * effect, alpha) < 0.75


def test_power_by_enumeration():
    """Every outcome (gained, lost, same) of 9 documents."""
    for discordance, effect in ((0.4, 0.3), (0.9, 0.9), (1.0, 0.5)):
        gain, loss = (discordance + effect) / 2, (discordance - effect) / 2
        total = 0.0
        for gained in range(10):
            for lost in range(10 - gained):
                if paired.mcnemar(gained, lost) <= 0.05:
                    total += stats.multinomial.pmf(
                        [gained, lost, 9 - gained - lost], 9, [gain, loss, 1 - gain - loss]
                    )
        assert paired.mcnemar_power(9, discordance, effect) == pytest.approx(total)


def test_what_cannot_be_detected():
    """Five documents, all turned right, give p = 1/16: no effect is large enough."""
    assert paired.minimum_detectable_effect(5, 0.1) == math.inf
    assert 0 < paired.minimum_detectable_effect(6, 0.1) <= 1
    assert paired.mcnemar_power(100, 0.0, 0.0) == 0.0
    with pytest.raises(ValueError, match="discordance 1.5, expected"):
        paired.minimum_detectable_effect(10, 1.5)
    with pytest.raises(ValueError, match="expected .effect. ≤ discordance"):
        paired.mcnemar_power(10, 0.1, 0.2)


def test_minimum_detectable_mean():
    draw = np.random.default_rng(5)
    effect = paired.minimum_detectable_mean(80, 2.0)
    found = [paired.paired_t(draw.normal(effect, 2.0, 80)) < 0.05 for _ in range(1000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_perplexity():
    """Token-weighted, and its error near that of resampled texts."""
    draw = np.random.default_rng(6)
    tokens = draw.integers(20, 400, 300)
    nll = draw.normal(2.5, 0.4, 300) + 20 / tokens
    mean, error = paired.weighted_mean(nll, tokens)
    assert mean == pytest.approx((nll * tokens).sum() / tokens.sum())
    value, error = paired.perplexity(mean, error)
    assert value == pytest.approx(math.exp(mean))
    drawn = draw.integers(0, 300, (4000, 300))
    resampled = np.exp((nll * tokens)[drawn].sum(1) / tokens[drawn].sum(1))
    assert error == pytest.approx(resampled.std(), rel=0.06)
    assert paired.weighted_mean(nll)[1] == pytest.approx(stats.sem(nll))
    assert math.isnan(paired.perplexity(*paired.weighted_mean([1.0]))[1])
    assert paired.perplexity(*paired.weighted_mean([800.0, 801.0]))[0] == math.inf
    with pytest.raises(ValueError, match="finite values"):
        paired.weighted_mean([1.0, math.nan])
