"""Compare on the documents of least confidence, as the paper does, and show why that flatters.

The paper scores a pool, keeps the documents with the smallest confidence margin of the baseline and
compares on those. A margin that is small by accident grows on the next look (regression to the
mean), and moving wrong answers about can only gain, so a change without direction seems to help
there. Resampling the same margins shows by how much, with two kinds of null variant:

- ``swap``: baseline and variant are two looks at one truth. Which is which is tossed for every
  document, and selection and comparison are done anew (a permutation test of the whole procedure);
- ``flip``: the variant is the baseline and a change. Its sign is tossed for every document.

Selection on the mean of both margins, ``(m + m') / 2``, favours neither side; selection on the
variant's own favours the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy

from vps.evaluation.paired import Outcome

ORDERS = ("uncertain", "hardest")


@dataclass(frozen=True)
class Contrast:
    """Compare baseline and variant on the documents that one rule selected.

    Args:
        baseline: share of right answers of the baseline.
        variant: that of the variant.
        gained: documents wrong before and right now.
        lost: documents right before and wrong now.
    """

    baseline: float
    variant: float
    gained: int
    lost: int

    @property
    def difference(self) -> float:
        """Return the share of right answers that the variant has more."""
        return self.variant - self.baseline


@dataclass(frozen=True)
class Null:
    """Say what changes without direction show under the same selection.

    Args:
        mean: of the difference in the share of right answers.
        interval: its 2.5 % and 97.5 % quantiles.
        p_value: share of null variants with a difference as large as the observed, or larger.
    """

    mean: float
    interval: tuple[float, float]
    p_value: float


@dataclass(frozen=True)
class ConfidenceFiltered:
    """Hold what :func:`confidence_filtered` found.

    Args:
        pool: documents scored.
        kept: documents selected, n.
        order: ``"hardest"`` or ``"uncertain"``.
        documents: those selected by the baseline's margin, smallest first, each as its task and
            its identity.
        selected: on those, as the paper has it.
        whole: on the whole pool.
        by_mean: on as many selected by the mean of both margins.
        by_variant: on as many selected by the variant's margin.
        swap: null variants by exchange of baseline and variant.
        flip: null variants by the sign of the change.
        resamples: null variants drawn.
    """

    pool: int
    kept: int
    order: str
    documents: tuple[tuple[str, str], ...]
    selected: Contrast
    whole: Contrast
    by_mean: Contrast
    by_variant: Contrast
    swap: Null
    flip: Null
    resamples: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, differences included."""
        values = asdict(self)
        for name in ("selected", "whole", "by_mean", "by_variant"):
            values[name]["difference"] = getattr(self, name).difference
        return values

    def __str__(self) -> str:
        def line(title: str, found: Contrast) -> str:
            return (
                f"{title:<34} {found.baseline:7.1%} {found.variant:7.1%} "
                f"{100 * found.difference:+6.1f} points  +{found.gained} −{found.lost}"
            )

        def null(name: str, found: Null) -> str:
            low, high = (100 * bound for bound in found.interval)
            return (
                f"{'a change without direction, ' + name:<34} {100 * found.mean:+22.1f} points "
                f"({low:+.1f} to {high:+.1f}), p = {found.p_value:.3g}"
            )

        return "\n".join(
            (
                f"{f'{self.kept} {self.order} of {self.pool} documents':<34} baseline variant",
                line("selected by the baseline's margin", self.selected),
                null("swap", self.swap),
                null("flip", self.flip),
                line("selected by the mean margin", self.by_mean),
                line("selected by the variant's margin", self.by_variant),
                line("all documents", self.whole),
            )
        )


def confidence_filtered(
    baseline: Sequence[Outcome],
    variant: Sequence[Outcome],
    n: int,
    *,
    order: str = "uncertain",
    resamples: int = 5_000,
    seed: int = 0,
) -> ConfidenceFiltered:
    """Keep the n documents with the smallest margin of the baseline, and compare on them.

    Args:
        baseline: outcomes of the true baseline on the pool, all of one metric whose value is 1
            where the margin is positive, such as ``"acc"``.
        variant: outcomes of the same documents and metric, in any order.
        n: documents to keep, 1 to the size of the pool.
        order: ``"uncertain"`` by the margin's distance from 0, the confidence as the paper has it;
            ``"hardest"`` by the margin, which knows the labels, so that wrong answers come first.
        resamples: null variants to draw, at least 1.
        seed: of those.

    Raises:
        ValueError: outcomes of several metrics, without margins, with a value that the margin
            contradicts, or of other documents; n, order or resamples out of range.

    Source: the paper, section 6.1; SPEC §5 says what the true baseline is.
    """
    if order not in ORDERS:
        raise ValueError(
            f"confidence_filtered: order must be one of {', '.join(ORDERS)}, got {order!r}"
        )
    if isinstance(resamples, bool) or not isinstance(resamples, int) or resamples < 1:
        raise ValueError(
            f"confidence_filtered: resamples must be an integer ≥ 1, got {resamples!r}"
        )
    plain, changed = _by_document(baseline, "baseline"), _by_document(variant, "variant")
    if plain.keys() != changed.keys():
        alone = len(plain.keys() ^ changed.keys())
        raise ValueError(
            f"confidence_filtered: variant must have the documents of the baseline, {alone} are "
            "in one of them only"
        )
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= len(plain):
        raise ValueError(
            f"confidence_filtered: n must be 1 to {len(plain)}, the size of the pool, got {n!r}"
        )
    documents = list(plain)
    before = numpy.array([plain[key].margin for key in documents], dtype=float)
    after = numpy.array([changed[key].margin for key in documents], dtype=float)
    right = numpy.array([plain[key].value for key in documents], dtype=float)
    right_after = numpy.array([changed[key].value for key in documents], dtype=float)

    def smallest(margins: numpy.ndarray) -> numpy.ndarray:
        keys = margins if order == "hardest" else numpy.abs(margins)
        return numpy.argsort(keys, kind="stable")[:n]

    kept = smallest(before)
    selected = _compare(right, right_after, kept)
    generator = numpy.random.default_rng(seed)
    swapped, flipped = numpy.empty(resamples), numpy.empty(resamples)
    m, moved, was_right = before[kept], (after - before)[kept], right[kept].mean()
    for index in range(resamples):
        swap = generator.integers(0, 2, len(documents)).astype(bool)
        chosen = smallest(numpy.where(swap, after, before))
        gains = (right_after - right)[chosen]
        swapped[index] = numpy.where(swap[chosen], -gains, gains).mean()
        signs = generator.integers(0, 2, n) * 2 - 1
        flipped[index] = (m + signs * moved > 0).mean() - was_right
    return ConfidenceFiltered(
        pool=len(documents),
        kept=n,
        order=order,
        documents=tuple(documents[index] for index in kept),
        selected=selected,
        whole=_compare(right, right_after, numpy.arange(len(documents))),
        by_mean=_compare(right, right_after, smallest((before + after) / 2)),
        by_variant=_compare(right, right_after, smallest(after)),
        swap=_null(swapped, selected.difference),
        flip=_null(flipped, selected.difference),
        resamples=resamples,
    )


def _by_document(outcomes: Sequence[Outcome], name: str) -> dict[tuple[str, str], Outcome]:
    metrics = sorted({outcome.metric for outcome in outcomes})
    if len(metrics) != 1:
        raise ValueError(
            f"confidence_filtered: {name} must be outcomes of one metric, got "
            f"{', '.join(metrics) or 'none'}"
        )
    found: dict[tuple[str, str], Outcome] = {}
    for outcome in outcomes:
        where = f"{name}, document {outcome.document!r} of {outcome.task!r}"
        key = (outcome.task, outcome.document)
        if key in found:
            raise ValueError(f"confidence_filtered: {where} comes twice")
        if outcome.margin is None or not numpy.isfinite(outcome.margin):
            raise ValueError(
                f"confidence_filtered: {where} must have a finite margin, got {outcome.margin!r}"
            )
        if outcome.margin != 0 and outcome.value != float(outcome.margin > 0):
            raise ValueError(
                f"confidence_filtered: {where} must have a value of 1 where its margin is positive "
                f"and 0 where not, got {outcome.value!r} and {outcome.margin!r}"
            )
        found[key] = outcome
    return found


def _null(differences: numpy.ndarray, observed: float) -> Null:
    low, high = numpy.quantile(differences, (0.025, 0.975))
    reached = int((differences >= observed - 1e-12).sum())
    p_value = (1 + reached) / (1 + len(differences))
    return Null(float(differences.mean()), (float(low), float(high)), p_value)


def _compare(before: numpy.ndarray, after: numpy.ndarray, index: numpy.ndarray) -> Contrast:
    old, new = before[index], after[index]
    return Contrast(
        float(old.mean()), float(new.mean()), int((new > old).sum()), int((new < old).sum())
    )
