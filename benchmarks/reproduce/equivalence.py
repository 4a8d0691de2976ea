"""Test whether two variants are equivalent: two one-sided tests at ±margin, and their power.

For right and wrong answers each is Tango's score test of a paired difference δ, which holds where
few answers change: ``Z(δ) = (b − c − nδ) / √(n(2q + δ(1 − δ)))``, b gained, c lost, q the likeliest
share of lost answers if the difference is δ. For means each is a t-test. The larger p counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from vps.evaluation.paired import LEVEL


def score(gained: Any, lost: Any, n: int, difference: float) -> Any:
    """Return Tango's Z for the hypothesis that the true difference in accuracy is ``difference``.

    Args:
        gained, lost: answers right under the variant only and under the other only; arrays too.
        n: paired answers.
        difference: δ, −1 to 1, not 0 where nothing changed.

    Source: T. Tango, Statistics in Medicine 17 (1998), 891–908.
    """
    b, c, d = np.asarray(gained, dtype=float), np.asarray(lost, dtype=float), difference
    half = -b - c + (2 * n - b + c) * d
    q = (np.sqrt(half**2 + 8 * n * c * d * (1 - d)) - half) / (4 * n)
    return (b - c - n * d) / np.sqrt(n * (2 * q + d * (1 - d)))


def accuracies(gained: int, lost: int, n: int, margin: float) -> float:
    """Return the p of two one-sided score tests that the accuracies differ by less than ``margin``.

    Args:
        gained, lost, n: as for :func:`score`.
        margin: above 0; 0.02 is two points.

    Raises:
        ValueError: counts that do not fit n, or a margin out of range.
    """
    if min(gained, lost) < 0 or gained + lost > n or not 0 < margin < 1:
        raise ValueError(
            f"equivalence: gained {gained}, lost {lost} of {n}, margin {margin}; expected counts "
            "of at most n together and a margin between 0 and 1"
        )
    low, high = score(gained, lost, n, -margin), score(gained, lost, n, margin)
    return float(max(stats.norm.sf(low), stats.norm.cdf(high)))


def means(differences: Any, margin: float) -> float:
    """Return the p of two one-sided t-tests that the mean of paired differences is within ±margin.

    Args:
        differences: [n], n ≥ 2.
        margin: above 0, in their unit.
    """
    d = np.asarray(differences, dtype=float)
    if len(d) < 2:
        raise ValueError(f"equivalence: {len(d)} differences, expected at least 2")
    if np.ptp(d) == 0:
        return 0.0 if abs(d[0]) < margin else 1.0
    above = stats.ttest_1samp(d, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(d, margin, alternative="less").pvalue
    return float(max(above, below))


def power(
    n: int, discordance: float, margin: float, alpha: float = LEVEL, effect: float = 0.0
) -> float:
    """Return the exact chance that :func:`accuracies` gives at most ``alpha``.

    Args:
        n: paired answers, drawn independently.
        discordance: share of answers that are right under one variant only.
        margin: as for :func:`accuracies`.
        alpha: level.
        effect: the true difference in accuracy, at most the discordance in size.
    """
    if not abs(effect) <= discordance <= 1:
        raise ValueError(f"equivalence: effect {effect} beyond the discordance {discordance}")
    total, z = 0.0, stats.norm.isf(alpha)
    share = 0.5 if discordance == 0 else 0.5 * (1 + effect / discordance)
    changed = np.arange(n + 1)
    chances = stats.binom.pmf(changed, n, discordance)
    for d, chance in zip(changed[chances > 1e-9], chances[chances > 1e-9], strict=True):
        gained = np.arange(d + 1)
        shown = (score(gained, d - gained, n, -margin) >= z) & (
            score(gained, d - gained, n, margin) <= -z
        )
        total += chance * stats.binom.pmf(gained, d, share)[shown].sum()
    return float(total)
