"""Whether two answers are equal, and the four parts of the verification loss (SPEC §9)."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from vps.verify import units
from vps.verify.answer import Answer, extract_answer
from vps.verify.arithmetic import UndecidableError
from vps.verify.kinds import Parts
from vps.verify.pool import Pool, default_pool
from vps.verify.text import undressed

# A loss stays a finite float, also the sum of several.
LARGEST = 1e300
# Conversions through pint's rounded constants, such as degrees to radians.
CONVERSION_TOLERANCE = Fraction(1, 10**9)

# One of several answers that a question offers, alone or before its text: "(C) 12".
CHOICE = re.compile(r"(?:option |choice )?(?:\(\s?)?(?P<letter>[A-Z])(?:\s?\)\.?|[.:](?=\s)|\.?$)")

Samples = Sequence[str] | Callable[[], Iterable[str]]


class Equality(enum.Enum):
    """What is known of two answers."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNDECIDED = "undecided"


def compare(
    prediction: Answer, gold: Answer, deadline: float, pool: Pool | None = None
) -> Equality:
    """Compare two answers, units apart unless both are numbers.

    Args:
        prediction, gold: from :func:`vps.verify.extract_answer`.
        deadline: in ``time.monotonic()``; without a verdict by then it is undecided.
        pool: the workers to ask; the default pool if ``None``.

    Raises:
        ImportError: a package of the extra ``verify`` is needed and missing.
    """
    chosen = [CHOICE.match(undressed(answer.text).strip()) for answer in (prediction, gold)]
    if chosen[0] and chosen[1] and "" in (found.string[found.end() :] for found in chosen if found):
        return equal_if(chosen[0]["letter"] == chosen[1]["letter"])
    if prediction.undecidable or gold.undecidable:
        return Equality.UNDECIDED
    if gold.says_words:
        same = gold.words and gold.words == prediction.words
        valued = gold.words not in ("nan", "inf")
        return Equality.EQUAL if same and valued else Equality.UNDECIDED
    if prediction.says_words:
        return Equality.DIFFERENT
    if prediction.parts or gold.parts:
        return compare_parts(prediction, gold)
    relations = prediction.formula and gold.formula
    if prediction.value is not None and gold.value is not None and not relations:
        return equal_if(numbers_equal(prediction, gold))
    if gold.unit and prediction.unit != gold.unit and not units.is_money(gold.unit):
        return Equality.UNDECIDED
    request = {"prediction": for_worker(prediction), "gold": for_worker(gold)}
    found = (pool or default_pool()).ask(request, deadline)
    return Equality(found["verdict"]) if found else Equality.UNDECIDED


def equal_if(shown: bool) -> Equality:
    """Return equal or different."""
    return Equality.EQUAL if shown else Equality.DIFFERENT


def for_worker(answer: Answer) -> str:
    """Write an answer as LaTeX."""
    if answer.formula is not None:
        return answer.formula
    value = answer.value or Fraction(0)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def numbers_equal(prediction: Answer, gold: Answer) -> bool:
    """Tell whether two answers are the same number, exactly or by conversion."""
    converted = prediction.unit != gold.unit
    for a, b in magnitudes(prediction, gold):
        if a == b or converted and a.denominator * b.denominator > 10**12:
            if abs(a - b) <= CONVERSION_TOLERANCE * abs(b):
                return True
    return False


def magnitudes(prediction: Answer, gold: Answer) -> list[tuple[Fraction, Fraction]]:
    """List the pairs of numbers that two answers may be read as, in the gold's unit.

    One pair, but for a unit without dimension on one side only: 12 % is 12 and 0.12.
    """
    if prediction.value is None or gold.value is None:
        raise ValueError("magnitudes: both answers must have a value")
    raw = (prediction.value, gold.value)
    if None in (prediction.unit, gold.unit) and units.is_money(prediction.unit or gold.unit):
        return [raw]
    theirs = units.resolved(prediction.unit, gold.unit)
    ours = units.resolved(gold.unit, prediction.unit)
    if theirs == ours:
        return [raw]
    try:
        if theirs and ours:
            if units.same_dimension(theirs, ours):
                return [(units.convert(prediction.value, theirs, ours), gold.value)]
        elif theirs and not units.dimension(theirs):
            return [raw, (units.to_base(prediction.value, theirs), gold.value)]
        elif ours and not units.dimension(ours):
            return [raw, (prediction.value, units.to_base(gold.value, ours))]
    except UndecidableError:
        return [raw]
    return [raw]


def compare_parts(prediction: Answer, gold: Answer) -> Equality:
    """Compare ratios, times, dates and ranges with one another and with numbers."""
    theirs, ours = prediction.parts, gold.parts
    if theirs is None or ours is None:
        parts, other = (theirs or ours or ()), (gold if theirs else prediction)
        if other.formula or parts[0] == "span":
            return Equality.UNDECIDED
        ratio = parts[0] in ("ratio", "clock") and proportional(parts[1:], (other.value, 1))
        return equal_if(ratio) if parts[0] == "ratio" or not ratio else Equality.UNDECIDED
    kinds = {str(theirs[0]), str(ours[0])}
    pairs = list(zip(theirs[1:], ours[1:], strict=False))
    if kinds <= {"range", "span"}:
        answers = [(as_number(prediction, p), as_number(gold, g)) for p, g in pairs]
        return equal_if(all(numbers_equal(p, g) for p, g in answers))
    if kinds <= {"ratio", "clock"}:
        equal = proportional(theirs[1:], ours[1:])
        unclear = kinds == {"clock"} and equal and theirs != ours
        return Equality.UNDECIDED if unclear else equal_if(equal)
    if kinds <= {"time", "clock"}:
        return compare_times(theirs, ours)
    if "unclear date" in kinds and theirs != ours:
        shared = set(theirs[1:]) & set(ours[1:])
        return Equality.UNDECIDED if shared else Equality.DIFFERENT
    unsaid = kinds == {"date"} and all(0 in pair for pair in pairs if pair[0] != pair[1])
    swapped = kinds <= {"ratio", "range", "span"} and theirs[1:] == ours[1:]
    return (
        Equality.UNDECIDED if theirs != ours and (unsaid or swapped) else equal_if(theirs == ours)
    )


def as_number(answer: Answer, value: object) -> Answer:
    """Return one end of a range as an answer of its own."""
    return Answer(answer.text, answer.source, value=Fraction(str(value)), unit=answer.unit)


def proportional(left: Sequence[object], right: Sequence[object]) -> bool:
    """Tell whether two ratios are one: ``3:2`` and ``6:4``."""
    a, b = ([Fraction(str(term)) for term in terms] for terms in (left, right))
    return len(a) == len(b) and all(x * b[0] == y * a[0] for x, y in zip(a, b, strict=True))


def compare_times(theirs: Parts, ours: Parts) -> Equality:
    """Compare times of day; without am or pm the same figures may be another time."""
    (h, m, s, said), (hour, minute, second, also_said) = (
        (*parts[1:], 0, int(str(parts[1])) > 12) if parts[0] == "clock" else parts[1:]
        for parts in (theirs, ours)
    )
    if (m, s) != (minute, second) or int(str(h)) % 12 != int(str(hour)) % 12:
        return Equality.DIFFERENT
    return equal_if(h == hour) if bool(said) == bool(also_said) else Equality.UNDECIDED


def to_float(loss: Fraction) -> float:
    """Return a loss as a float, at most 1e300."""
    return float(loss) if loss < LARGEST else LARGEST


def numeric_loss(prediction: Answer | None, gold: Answer | None) -> float:
    """Return ``(ŷ − y*)²`` in the gold's unit; ``max(1, y*²)`` without a number in the prediction.

    0 where the gold has no number. Of two readings (12 % is 12 and 0.12) the nearer counts.
    """
    if gold is None or gold.value is None:
        return 0.0
    if prediction is None or prediction.value is None:
        return to_float(max(Fraction(1), gold.value**2))
    return to_float(min((a - b) ** 2 for a, b in magnitudes(prediction, gold)))


def units_loss(prediction: Answer | None, gold: Answer | None) -> float:
    """Return 1 if the dimension differs from the gold's, 0 if equal or the gold has no unit.

    Money may be left out: ``18`` answers ``$18``.
    """
    if gold is None or gold.unit is None:
        return 0.0
    if prediction is None or prediction.says_words or prediction.undecidable:
        return 1.0
    theirs = units.resolved(prediction.unit, gold.unit)
    ours = units.resolved(gold.unit, prediction.unit)
    if theirs is None and units.is_money(ours):
        return 0.0
    try:
        return 0.0 if units.same_dimension(theirs, ours) else 1.0
    except UndecidableError:
        return 1.0


def algebraic_loss(
    prediction: Answer | None, gold: Answer | None, deadline: float, pool: Pool | None = None
) -> tuple[float, bool]:
    """Return 0 if the answers are equal or the gold has words only, else 1; and if it was decided.

    Args:
        prediction, gold, deadline, pool: as for :func:`compare`.
    """
    if gold is None:
        return 0.0, True
    if prediction is None:
        return float(not gold.says_words), True
    return of_equality(compare(prediction, gold, deadline, pool), gold)


def of_equality(equality: Equality, gold: Answer) -> tuple[float, bool]:
    """Return :func:`algebraic_loss` of a comparison that was made."""
    if equality is Equality.UNDECIDED:
        return float(not gold.says_words), gold.says_words
    return float(equality is Equality.DIFFERENT), True


def self_consistency_loss(samples: Samples) -> float:
    """Return ``Var(ŷ_i) / (mean² + 1e-6)`` over sampled answers; 1 with fewer than two numbers.

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


def in_base_units(answers: Sequence[Answer]) -> list[Fraction] | None:
    """Return magnitudes in base units if units differ and all measure the same."""
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
    """Return 1 if the prediction's dimension is not the most common of the samples, else 0."""
    found = [answer.unit for answer in map(extract_answer, samples) if answer]
    units_found = [unit for unit in found if unit is not None]
    if 2 * len(units_found) <= len(found):
        return 0.0
    common = max(set(units_found), key=units_found.count)
    gold = Answer("", "text", value=Fraction(0), unit=common)
    return units_loss(prediction, gold)
