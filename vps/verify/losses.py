"""The four parts of the verification loss (SPEC §9), each of extracted answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from vps.verify import units
from vps.verify.algebra import Equality, compare, expression, magnitudes
from vps.verify.answer import Answer, extract_answer
from vps.verify.limits import UndecidableError
from vps.verify.pool import Pool

# A loss stays a finite float, also the sum of several.
LARGEST = 1e300

Samples = Sequence[str] | Callable[[], Iterable[str]]


def to_float(loss: Fraction) -> float:
    """A loss as a float, at most 1e300."""
    return float(loss) if loss < LARGEST else LARGEST


def numeric_loss(prediction: Answer | None, gold: Answer | None) -> float:
    """``(ŷ − y*)²`` in the gold's unit; ``max(1, y*²)`` without a number in the prediction.

    0 where the gold has no number. Of two readings (12 % is 12 and 0.12) the nearer counts.
    """
    if gold is None or gold.value is None:
        return 0.0
    if prediction is None or prediction.value is None:
        return to_float(max(Fraction(1), gold.value**2))
    return to_float(min((a - b) ** 2 for a, b in magnitudes(prediction, gold)))


def units_loss(prediction: Answer | None, gold: Answer | None) -> float:
    """1 if the dimension differs from the gold's, 0 if equal or the gold has no unit."""
    if gold is None or gold.unit is None:
        return 0.0
    if prediction is None or prediction.value is None and expression(prediction) is None:
        return 1.0
    try:
        return 0.0 if units.same_dimension(prediction.unit, gold.unit) else 1.0
    except UndecidableError:
        return 1.0


def algebraic_loss(
    prediction: Answer | None, gold: Answer | None, deadline: float, pool: Pool | None = None
) -> tuple[float, bool]:
    """0 if the expressions are equal or the gold has none, else 1; and whether it was decided."""
    if gold is None or expression(gold) is None and not gold.undecidable:
        return 0.0, True
    if prediction is None:
        return 1.0, True
    equality = compare(prediction, gold, deadline, pool)
    return float(equality is not Equality.EQUAL), equality is not Equality.UNDECIDED


def self_consistency_loss(samples: Samples) -> float:
    """``Var(ŷ_i) / (mean² + 1e-6)`` over sampled answers; 1 with fewer than two numbers.

    Args:
        samples: texts, or a callable that makes them. Numbers with units of one dimension are
            compared in base units, all others as they stand.

    Raises:
        TypeError: neither, or a sample is not a string.
    """
    answers = [answer for answer in map(extract_answer, sample_texts(samples)) if answer]
    numbers = [answer for answer in answers if answer.value is not None]
    if len(numbers) < 2:
        return 1.0
    found = in_base_units(numbers) or [answer.value or Fraction(0) for answer in numbers]
    mean = sum(found, Fraction(0)) / len(found)
    variance = sum(((value - mean) ** 2 for value in found), Fraction(0)) / len(found)
    return to_float(variance / (mean**2 + Fraction(1, 10**6)))


def sample_texts(samples: Samples) -> list[str]:
    """The texts of :func:`self_consistency_loss`, made if need be."""
    if isinstance(samples, (str, bytes)):
        raise TypeError(
            "vps.verify: samples must be a sequence of str or a callable that makes them, "
            f"got one {type(samples).__name__}"
        )
    made = samples() if callable(samples) else samples
    try:
        texts = list(made)
    except TypeError:
        raise TypeError(
            "vps.verify: samples must be a sequence of str or a callable that makes them, "
            f"got {type(made).__name__}"
        ) from None
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"vps.verify: each sample must be a str, got {type(text).__name__}")
    return texts


def in_base_units(answers: Sequence[Answer]) -> list[Fraction] | None:
    """Magnitudes in base units if units differ and all measure the same."""
    named = [answer.unit for answer in answers]
    if len(set(named)) == 1 or None in named:
        return None
    try:
        if not all(units.same_dimension(unit, named[0]) for unit in named):
            return None
        return [
            units.to_base(answer.value, answer.unit)
            for answer in answers
            if answer.value is not None and answer.unit is not None
        ]
    except UndecidableError:
        return None


def units_agreement_loss(prediction: Answer | None, samples: Sequence[str]) -> float:
    """1 if the prediction's dimension is not the most common one of the samples, else 0."""
    found = [answer.unit for answer in map(extract_answer, samples) if answer]
    units_found = [unit for unit in found if unit is not None]
    if 2 * len(units_found) <= len(found):
        return 0.0
    common = max(set(units_found), key=units_found.count)
    gold = Answer("", "text", value=Fraction(0), unit=common)
    return units_loss(prediction, gold)
