"""Pair the outcomes of two variants by document, and compute their statistics.

Scipy computes them, except for Holm's correction, which it lacks.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np

LEVEL = 0.05  # of every test, after Holm's correction
POWER = 0.8  # with which an effect counts as detectable


@dataclass(frozen=True)
class Outcome:
    """Hold the result of one document of a task under one variant of a model.

    Args:
        task: name of the task.
        document: identity of the document within the task, the same in every run.
        metric: what is measured, such as ``"acc"``, ``"exact_match"`` or ``"nll"``.
        value: of the metric; 0 or 1 where the answer is right or wrong.
        margin: log-likelihood of the right choice less that of the best wrong one, in nats;
            ``None`` where there are no choices.
        weight: what the value is averaged by, such as the tokens of a text for ``"nll"``.
    """

    task: str
    document: str
    metric: str
    value: float
    margin: float | None = None
    weight: float = 1.0


class Measured(Protocol):
    """Say of which task and metric something is."""

    @property
    def task(self) -> str: ...

    @property
    def metric(self) -> str: ...


M = TypeVar("M", bound=Measured)


def grouped(measured: Iterable[M]) -> dict[tuple[str, str], list[M]]:
    """Group outcomes or comparisons by task and metric, in their order."""
    groups: dict[tuple[str, str], list[M]] = {}
    for each in measured:
        groups.setdefault((each.task, each.metric), []).append(each)
    return groups


def check_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Refuse outcomes that allow no statistics.

    Raises:
        ValueError: none at all, a document twice, or a value that is not finite.
    """
    if not outcomes:
        raise ValueError("the evaluation gave no outcome")
    seen = set()
    for each in outcomes:
        where = f"{each.metric} of document {each.document!r} of {each.task}"
        if (each.task, each.metric, each.document) in seen:
            raise ValueError(f"{where} comes twice")
        seen.add((each.task, each.metric, each.document))
        if not math.isfinite(each.value) or not math.isfinite(each.weight) or each.weight <= 0:
            raise ValueError(
                f"{where} is {each.value} with weight {each.weight}, expected finite numbers and a "
                "positive weight"
            )


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p of McNemar's test, binomial with ½; 1 without a change.

    Args:
        gained: documents wrong before and right now.
        lost: documents right before and wrong now.

    Raises:
        ValueError: a negative count.
    """
    for name, count in (("gained", gained), ("lost", lost)):
        if count < 0:
            raise ValueError(f"mcnemar: {name} is {count}, expected at least 0")
    if gained + lost == 0:
        return 1.0
    return float(_stats().binomtest(gained, gained + lost, 0.5).pvalue)


def paired_t(differences: Any, weights: Any = None) -> float:
    """Return the two-sided p that the weighted mean of paired differences is 0: t-test of ``w·d``.

    Args:
        differences: [n], in the unit of the metric.
        weights: [n], positive; all 1 when ``None``.

    Returns:
        p; 1 where every difference is 0 or there is only one document.
    """
    d, w = _checked("paired_t", differences, weights)
    terms = d * w
    if len(d) < 2 or not terms.any():
        return 1.0
    if np.ptp(terms) == 0:
        return 0.0
    return float(_stats().ttest_1samp(terms, 0.0).pvalue)


def difference_interval(
    differences: Any,
    weights: Any = None,
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 1 - LEVEL,
    resamples: int = 9999,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the paired bootstrap interval (percentiles) of the weighted mean of differences.

    Documents are drawn with replacement, within their task where there are several.

    Args:
        differences: [n], variant less baseline of each document.
        weights: [n], positive; all 1 when ``None``.
        groups: [n], the task of each document; one task when ``None``.
        level: coverage, not corrected for other intervals.
        resamples: how many samples are drawn.
        seed: of the draws.

    Returns:
        ``(low, high)``; NaN where no task has two documents.

    Raises:
        ValueError: arrays of different lengths, none, or values that cannot be used.
    """
    d, w = _checked("difference_interval", differences, weights)
    labels = [0] * len(d) if groups is None else list(groups)
    if len(labels) != len(d):
        raise ValueError(
            f"difference_interval: {len(labels)} groups for {len(d)} differences, expected as many"
        )
    places: dict[Hashable, list[int]] = {}
    for position, label in enumerate(labels):
        places.setdefault(label, []).append(position)
    samples = [np.array(each) for each in places.values() if len(each) > 1]
    alone = np.array([each[0] for each in places.values() if len(each) == 1], dtype=int)
    if not samples:
        return math.nan, math.nan
    if not np.ptp(d):
        return float(d[0]), float(d[0])
    product = d * w

    def mean(*drawn: Any, axis: int) -> Any:
        chosen = [each.astype(int) for each in drawn]
        above = sum(product[each].sum(axis) for each in chosen) + product[alone].sum()
        return above / (sum(w[each].sum(axis) for each in chosen) + w[alone].sum())

    found = _stats().bootstrap(
        samples,
        mean,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // len(d)),
        vectorized=True,
        axis=-1,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected by Holm's step-down method.

    The corrected value is ``max over p_j ≤ p_i of (m − rank_j)·p_j``, at most 1.

    Args:
        p_values: m p values of one family.

    Raises:
        ValueError: a p that is no probability.
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"holm: p is {p!r}, expected 0 to 1")
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def mcnemar_power(n: int, discordance: float, effect: float, alpha: float = LEVEL) -> float:
    """Return the exact power of the exact McNemar test.

    ``Σ_d Bin(d; n, ψ) · P(Bin(d, ½ + Δ/2ψ) is rejected at α)``, for documents drawn independently,
    of which a share ψ changes, in one direction more than in the other by Δ.

    Args:
        n: paired documents.
        discordance: ψ, share of documents that are right under one variant only.
        effect: Δ, difference in accuracy; at most ψ in size.
        alpha: level of the test.
    """
    if not 0 <= abs(effect) <= discordance <= 1:
        raise ValueError(
            f"mcnemar_power: effect {effect} and discordance {discordance}, "
            "expected |effect| ≤ discordance ≤ 1"
        )
    if discordance == 0:
        return 0.0
    binom = _stats().binom
    changed = np.arange(1, n + 1)
    chance = binom.pmf(changed, n, discordance)
    changed, chance = changed[chance > 1e-13], chance[chance > 1e-13]
    critical = binom.ppf(alpha / 2, changed, 0.5)
    critical -= binom.cdf(critical, changed, 0.5) > alpha / 2
    share = min(1.0, 0.5 * (1 + abs(effect) / discordance))
    rejected = binom.cdf(critical, changed, share) + binom.sf(
        changed - critical - 1, changed, share
    )
    return float((chance * rejected).sum())


@cache
def minimum_detectable_effect(
    n: int, discordance: float, alpha: float = LEVEL, power: float = POWER
) -> float:
    """Return the smallest true difference in accuracy that exact McNemar finds with ``power``.

    The Δ that solves ``mcnemar_power(n, max(ψ, Δ), Δ, α) = power``. It assumes documents drawn
    independently and that a share ψ of them changes, as was observed or is expected; Δ alone
    changes at least a share Δ.

    Args:
        n: paired documents.
        discordance: ψ.
        alpha: level; for one of m tests under Holm, α/m is what the smallest p has to meet.
        power: wanted chance of finding it.

    Returns:
        Δ between 0 and 1; infinity where n documents cannot show any effect.
    """
    if n < 1 or not 0 <= discordance <= 1:
        raise ValueError(
            f"minimum_detectable_effect: n is {n} and discordance {discordance}, "
            "expected n ≥ 1 and discordance 0 to 1"
        )

    def lacking(effect: float) -> float:
        return mcnemar_power(n, max(discordance, effect), effect, alpha) - power

    if lacking(1.0) < 0:
        return math.inf
    from scipy.optimize import brentq

    return float(brentq(lacking, 0.0, 1.0, xtol=1e-6))


def minimum_detectable_mean(
    n: int, deviation: float, alpha: float = LEVEL, power: float = POWER
) -> float:
    """Return the smallest mean of n paired differences that a test would probably show.

    This is ``(z_{1−α/2} + z_power) · σ/√n``. It assumes a mean that is normally distributed about
    the true difference.

    Args:
        n: paired documents.
        deviation: σ, standard deviation of the differences.
        alpha: as for :func:`minimum_detectable_effect`.
        power: as for :func:`minimum_detectable_effect`.
    """
    normal = _stats().norm
    return float((normal.ppf(1 - alpha / 2) + normal.ppf(power)) * deviation / math.sqrt(n))


def weighted_mean(values: Any, weights: Any = None) -> tuple[float, float]:
    """Return ``Σwv/Σw`` and its standard error by the delta method, NaN for a single document.

    The error is ``√(n/(n−1) · Σ w²(v − mean)²) / Σw``: that of the mean where all w are equal.

    Args:
        values: ``[n]``.
        weights: ``[n]``, positive; all 1 when ``None``.
    """
    v, w = _checked("weighted_mean", values, weights)
    mean = float((v * w).sum() / w.sum())
    if len(v) < 2:
        return mean, math.nan
    spread = ((w * (v - mean)) ** 2).sum() * len(v) / (len(v) - 1)
    return mean, float(math.sqrt(spread) / w.sum())


def perplexity(nll: float, error: float) -> tuple[float, float]:
    """Return the perplexity ``exp(nll)``, with its error by the delta method.

    Args:
        nll: mean negative log-likelihood, in nats per token.
        error: its standard error.
    """
    value = math.exp(nll) if nll < 700 else math.inf
    return value, value * error


def _checked(function: str, values: Any, weights: Any) -> tuple[Any, Any]:
    v = np.asarray(values, dtype=np.float64)
    w = np.ones_like(v) if weights is None else np.asarray(weights, dtype=np.float64)
    if v.ndim != 1 or v.shape != w.shape or not len(v):
        raise ValueError(
            f"{function}: values of shape {v.shape} and weights of shape {w.shape}, "
            "expected one dimension, as many, at least one"
        )
    if not np.isfinite(v).all() or not np.isfinite(w).all() or (w <= 0).any():
        raise ValueError(f"{function}: expected finite values and positive weights")
    return v, w


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError:
        raise ModuleNotFoundError(
            "statistics need scipy: pip install 'vps-kernels[eval]'"
        ) from None
    return stats
