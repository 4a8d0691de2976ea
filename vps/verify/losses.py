"""Whether two answers are equal, and the four parts of the verification loss (SPEC §9)."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from typing import Any

from vps.verify import units
from vps.verify.answer import Answer, extract_answer
from vps.verify.arithmetic import UndecidableError
from vps.verify.pool import Pool, default_pool
from vps.verify.text import undressed

# A loss stays a finite float, also the sum of several.
LARGEST = 1e300
# Conversions through pint's rounded constants, such as degrees to radians.
CONVERSION_TOLERANCE = Fraction(1, 10**9)

# One of several answers that a question offers, alone or before its text: "(C) 12".
CHOICE = re.compile(
    r"(?:[Oo]ption |[Cc]hoice )?(?:\(\s?)?(?P<letter>[A-Z])(?:\s?\)\.?|[.:](?=\s)|\.?$)"
)

Samples = Sequence[str] | Callable[[], Iterable[str]]


class Verdict(enum.Enum):
    """Whether a prediction answers what the gold does; undecided never counts as correct."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNDECIDED = "undecided"


def correct_if(shown: bool) -> Verdict:
    """Return correct or wrong."""
    return Verdict.CORRECT if shown else Verdict.WRONG


def compare(
    prediction: Answer | None, gold: Answer | None, deadline: float, pool: Pool | None = None
) -> Verdict:
    """Compare two answers, units apart unless both are numbers.

    Args:
        prediction, gold: from :func:`vps.verify.extract_answer`.
        deadline: in ``time.monotonic()``; without a verdict by then it is undecided.
        pool: the workers to ask; the default pool if ``None``.

    Raises:
        ImportError: a package of the extra ``verify`` is needed and missing.
    """
    if prediction is None or gold is None:
        return Verdict.WRONG if gold and not gold.undecidable else Verdict.UNDECIDED
    chosen = [CHOICE.match(undressed(answer.text).strip()) for answer in (prediction, gold)]
    texts = [found.string[found.end() :] if found else "" for found in chosen]
    if chosen[0] and chosen[1] and "" in texts:
        return correct_if(chosen[0]["letter"] == chosen[1]["letter"])
    if None in chosen:  # one is the text of a choice, without its letter
        prediction = extract_answer(texts[0]) or prediction
        gold = extract_answer(texts[1]) or gold
    if prediction.undecidable or gold.undecidable:
        return Verdict.UNDECIDED
    # "ab" beside a formula is a product.
    prediction, gold = product(prediction, gold), product(gold, prediction)
    if gold.says_words:
        same = gold.words and gold.words == prediction.words and gold.words not in ("nan", "inf")
        return Verdict.CORRECT if same else Verdict.UNDECIDED
    if prediction.says_words:
        return Verdict.WRONG
    if prediction.parts or gold.parts:
        return compare_parts(prediction, gold)
    relations = prediction.formula and gold.formula
    if prediction.value is not None and gold.value is not None and not relations:
        return correct_if(numbers_equal(prediction, gold))
    if gold.unit and prediction.unit != gold.unit and not units.is_money(gold.unit):
        return Verdict.UNDECIDED
    request = {"prediction": for_worker(prediction), "gold": for_worker(gold)}
    found = (pool or default_pool()).ask(request, deadline)
    return Verdict(found["verdict"]) if found else Verdict.UNDECIDED


def product(answer: Answer, other: Answer) -> Answer:
    """Return two or three letters beside a formula, or both in ``$``, as the product of them."""
    text = undressed(answer.text).strip()
    algebra = other.formula or answer.text[:1] == other.text[:1] == "$"
    letters = answer.says_words and algebra and re.fullmatch("[A-Za-z]{2,3}", text)
    return replace(answer, formula=letters[0]) if letters else answer


def for_worker(answer: Answer) -> str:
    """Write an answer as LaTeX."""
    if answer.formula is not None:
        return answer.formula
    value = answer.value or Fraction(0)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def numbers_equal(prediction: Answer, gold: Answer) -> bool:
    """Tell whether two answers are the same number, exactly or by conversion."""
    converted = prediction.unit != gold.unit
    return any(
        a == b
        or converted
        and a.denominator * b.denominator > 10**12
        and abs(a - b) <= CONVERSION_TOLERANCE * abs(b)
        for a, b in magnitudes(prediction, gold)
    )


def magnitudes(prediction: Answer, gold: Answer) -> list[tuple[Fraction, Fraction]]:
    """List the pairs of numbers that two answers may be read as, in the gold's unit.

    One pair, but for a unit without dimension on one side only: 12 % is 12 and 0.12.
    """
    if prediction.value is None or gold.value is None:
        raise ValueError("magnitudes: both answers must have a value")
    pair = (prediction.value, gold.value)
    theirs, ours = resolved(prediction, gold), resolved(gold, prediction)
    if theirs == ours or None in (theirs, ours) and units.is_money(theirs or ours):
        return [pair]
    try:
        converted = units.convert(prediction.value, theirs, ours), gold.value
    except (ValueError, UndecidableError):
        return [pair]
    return [converted] if theirs and ours else [pair, converted]


def resolved(answer: Answer, other: Answer) -> units.Unit | None:
    """Return the unit of an answer, which a word may name that means either of two."""
    return units.resolved(answer.unit, other.unit)


def compare_parts(prediction: Answer, gold: Answer) -> Verdict:
    """Compare ratios, times, dates and ranges with one another and with numbers.

    Answers that may be read as two kinds are compared as the kind that both may be.
    """
    if prediction.formula or gold.formula:
        return Verdict.UNDECIDED
    sides = [answer.parts or (("ratio", answer.value, 1),) for answer in (prediction, gold)]
    kinds = set.intersection(*({reading[0] for reading in side} for side in sides))
    theirs, ours = ({reading for reading in side if reading[0] in kinds} for side in sides)
    if kinds == {"range"}:
        ends: Iterable[tuple[Any, Any]] = zip(theirs.pop()[1:], ours.pop()[1:], strict=True)
        answers = [(replace(prediction, value=a), replace(gold, value=b)) for a, b in ends]
        return correct_if(all(numbers_equal(*pair) for pair in answers))
    if theirs == ours:
        return correct_if(bool(kinds))
    # A 0 is a part of a date that is not said.
    unclear = any(
        all(a == b or kinds == {"date"} and 0 in (a, b) for a, b in zip(one, other, strict=False))
        for one in theirs
        for other in ours
    )
    return Verdict.UNDECIDED if unclear else Verdict.WRONG


def to_float(loss: Fraction) -> float:
    """Return a loss as a float, at most 1e300."""
    return float(loss) if loss < LARGEST else LARGEST


def numeric_loss(prediction: Answer | None, gold: Answer | None) -> float:
    """Return ``(ŷ − y*)²`` in the gold's unit; ``max(1, y*²)`` without a number in the prediction.

    It is 0 where the gold has no number. Of two readings (12 % is 12 and 0.12) the nearer counts.

    Args:
        prediction: from :func:`vps.verify.extract_answer`.
        gold: likewise.
    """
    if gold is None or gold.value is None:
        return 0.0
    if prediction is None or prediction.value is None:
        return to_float(max(Fraction(1), gold.value**2))
    return to_float(min((a - b) ** 2 for a, b in magnitudes(prediction, gold)))


def units_loss(prediction: Answer | None, gold: Answer | None) -> float:
    """Return 1 if the dimension differs from the gold's, 0 if equal or the gold has no unit.

    Money may be left out: ``18`` answers ``$18``.

    Args:
        prediction: from :func:`vps.verify.extract_answer`.
        gold: likewise.
    """
    if gold is None or gold.unit is None:
        return 0.0
    if prediction is None or prediction.says_words or prediction.undecidable:
        return 1.0
    theirs, ours = resolved(prediction, gold), resolved(gold, prediction)
    if theirs is None and units.is_money(ours):
        return 0.0
    try:
        return 0.0 if units.same_dimension(theirs, ours) else 1.0
    except UndecidableError:
        return 1.0


def algebraic_loss(
    prediction: Answer | None, gold: Answer | None, deadline: float, pool: Pool | None = None
) -> tuple[float, bool]:
    """Return 0 if the answers are equal or the gold has words only, else 1.

    Args:
        prediction: from :func:`vps.verify.extract_answer`.
        gold: likewise.
        deadline: in ``time.monotonic()``; without a verdict by then the loss is 1.
        pool: the workers to ask; the default pool if ``None``.

    Returns:
        The loss, and whether it was decided in time.
    """
    return of_verdict(compare(prediction, gold, deadline, pool), prediction, gold)


def of_verdict(
    verdict: Verdict, prediction: Answer | None, gold: Answer | None
) -> tuple[float, bool]:
    """Return :func:`algebraic_loss` of a comparison that was made."""
    words = gold is None or gold.says_words
    if verdict is Verdict.UNDECIDED or words and prediction is None:
        return float(not words), words
    return float(verdict is Verdict.WRONG), True


def self_consistency_loss(samples: Samples) -> float:
    """Return ``Var(ŷ_i) / (mean² + 1e-6)`` over sampled answers; 1 with fewer than two numbers.

    Args:
        samples: texts, or a callable that makes them. Numbers with units of one dimension are
            compared in base units, all others as they stand.

    Raises:
        TypeError: neither, or a sample is not a string.
    """
    answers = [answer for answer in map(extract_answer, sample_texts(samples)) if answer]
    numbers = [(answer.value, answer.unit) for answer in answers if answer.value is not None]
    if len(numbers) < 2:
        return 1.0
    found = [value for value, _ in numbers]
    named = [unit for _, unit in numbers]
    if len(set(named)) > 1 and None not in named:
        with suppress(UndecidableError):
            scales = [units.scale(unit) for unit in named]
            if len({scale.dimension for scale in scales}) == 1:
                found = [scale.base(value) for scale, value in zip(scales, found, strict=True)]
    mean = sum(found, Fraction(0)) / len(found)
    variance = sum(((value - mean) ** 2 for value in found), Fraction(0)) / len(found)
    return to_float(variance / (mean**2 + Fraction(1, 10**6)))


def sample_texts(samples: Samples) -> list[str]:
    """Return the texts of :func:`self_consistency_loss`, made if need be."""
    expected = "vps.verify: samples must be a sequence of str or a callable that makes them, got "
    if isinstance(samples, (str, bytes)):
        raise TypeError(f"{expected}one {type(samples).__name__}")
    made = samples() if callable(samples) else samples
    try:
        texts = list(made)
    except TypeError:
        raise TypeError(f"{expected}{type(made).__name__}") from None
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"vps.verify: each sample must be a str, got {type(text).__name__}")
    return texts


def units_agreement_loss(prediction: Answer | None, samples: Sequence[str]) -> float:
    """Return 1 if the prediction's dimension is not the most common of the samples, else 0."""
    found = [answer.unit for answer in map(extract_answer, samples) if answer]
    named = [unit for unit in found if unit is not None]
    if 2 * len(named) <= len(found):
        return 0.0
    common = max(set(named), key=named.count)
    return units_loss(prediction, Answer("", "text", value=Fraction(0), unit=common))
