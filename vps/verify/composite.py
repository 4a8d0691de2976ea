"""The weighted verification loss ``L = Σ w_i ℓ_i`` and the verdict of one prediction (SPEC §9)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from vps.verify.answer import extract_answer
from vps.verify.losses import (
    Samples,
    Verdict,
    compare,
    numeric_loss,
    of_verdict,
    sample_texts,
    self_consistency_loss,
    units_agreement_loss,
    units_loss,
)
from vps.verify.pool import Pool, check_timeout, default_pool

DEFAULT_WEIGHTS: Mapping[str, float] = {
    "numeric": 1.0,
    "units": 0.5,
    "self_consistency": 0.3,
    "algebraic": 0.2,
}
TIMEOUT = 2.0
# The rest of the limit is for ending a worker that is late.
WORKING_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Losses:
    """What :class:`CompositeVerifier` returns.

    Attributes:
        parts: the loss of each part that was computed, without its weight.
        total: their weighted sum.
        undecided: parts that count as wrong since they could not be decided in time.
    """

    parts: dict[str, float]
    total: float
    undecided: tuple[str, ...] = ()


class CompositeVerifier:
    """Losses of a text against a gold text, both untrusted.

    Args:
        weights: the parts to compute with their weights, of ``numeric``, ``units``,
            ``self_consistency`` and ``algebraic``; all four with SPEC §9's weights if ``None``.
        timeout: seconds after which a part that is not decided counts as wrong. Samples that a
            callable makes take their own time.
        pool: workers for algebra; the default pool if ``None``, started in the background.

    Raises:
        TypeError: weights are no mapping, or a weight is no number.
        ValueError: a weight that names no part, no weight at all, or one that is negative or
            not finite; a timeout that is not positive.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        timeout: float = TIMEOUT,
        pool: Pool | None = None,
    ) -> None:
        self.weights = check_weights(DEFAULT_WEIGHTS if weights is None else weights)
        self.timeout = check_timeout(timeout)
        self.pool = pool
        if "algebraic" in self.weights:
            (pool or default_pool()).start()

    def __call__(
        self, prediction: str, gold: str | None = None, samples: Samples | None = None
    ) -> Losses:
        """Compute each part and the total.

        Args:
            prediction: what the model wrote.
            gold: the reference. Without it *numeric* and *algebraic* are left out, and *units*
                compares with the dimension that most samples have.
            samples: further answers, or a callable that makes them. Without them
                *self_consistency* is left out.

        Raises:
            TypeError: an argument of another type.
            ImportError: a part needs a package of the extra ``verify`` that is missing.
        """
        texts = None if samples is None else sample_texts(samples)
        deadline = time.monotonic() + WORKING_SHARE * self.timeout
        theirs = extract_answer(prediction)
        ours = None if gold is None else extract_answer(gold)
        verdict = Verdict.UNDECIDED
        if {"numeric", "algebraic"} & {*self.weights}:
            verdict = compare(theirs, ours, deadline, self.pool)
        parts: dict[str, float] = {}
        undecided: list[str] = []
        for name in self.weights:
            match name:
                case "numeric" if gold is not None:
                    equal = verdict is Verdict.CORRECT
                    parts[name] = 0.0 if equal else numeric_loss(theirs, ours)
                case "units" if gold is not None:
                    parts[name] = units_loss(theirs, ours)
                case "units":
                    parts[name] = units_agreement_loss(theirs, texts or [])
                case "algebraic" if gold is not None:
                    parts[name], decided = of_verdict(verdict, theirs, ours)
                    undecided += [] if decided else [name]
                case "self_consistency" if texts is not None:
                    parts[name] = self_consistency_loss(texts)
        total = math.fsum(self.weights[name] * loss for name, loss in parts.items())
        return Losses(parts, total, tuple(undecided))


def check_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Return a copy of the weights that :class:`CompositeVerifier` takes."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            "CompositeVerifier: weights must map names of parts to numbers, "
            f"got {type(weights).__name__}"
        )
    expected = ", ".join(DEFAULT_WEIGHTS)
    if not weights:
        raise ValueError(f"CompositeVerifier: weights name no part; parts are {expected}")
    for name, weight in weights.items():
        if name not in DEFAULT_WEIGHTS:
            raise ValueError(f"CompositeVerifier: no part is named {name!r}; parts are {expected}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(
                f"CompositeVerifier: weight of {name} must be a number, got {type(weight).__name__}"
            )
        if not 0 <= weight < 1e6:
            raise ValueError(
                f"CompositeVerifier: weight of {name} must be from 0 to 1e6, got {weight!r}"
            )
    return {name: float(weight) for name, weight in weights.items()}


def check(
    prediction: str, gold: str, *, timeout: float = TIMEOUT, pool: Pool | None = None
) -> Verdict:
    """Judge whether a prediction gives the gold's answer: number, unit, expression or words.

    Args:
        prediction: what the model wrote; untrusted.
        gold: the reference; untrusted, too.
        timeout: seconds after which the verdict is undecided.
        pool: as for :class:`CompositeVerifier`.

    Returns:
        ``CORRECT`` only where equality is shown, and ``WRONG`` only where a difference is;
        ``UNDECIDED`` for what is too large to work out, too late, or without an answer in the gold.

    Raises:
        TypeError, ValueError, ImportError: as for :class:`CompositeVerifier`.
    """
    deadline = time.monotonic() + WORKING_SHARE * check_timeout(timeout)
    theirs, ours = extract_answer(prediction), extract_answer(gold)
    read = ours and theirs and not (ours.undecidable or theirs.undecidable)
    if read and units_loss(theirs, ours):
        return Verdict.WRONG
    return compare(theirs, ours, deadline, pool)
