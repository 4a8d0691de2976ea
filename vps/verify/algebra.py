"""Whether two answers are equal: numbers in process, everything else by sympy in a worker."""

from __future__ import annotations

import enum
from fractions import Fraction
from typing import Any

from vps.verify import units
from vps.verify.answer import Answer
from vps.verify.limits import UndecidableError
from vps.verify.nodes import Node
from vps.verify.pool import Pool, default_pool

# Conversions through pint's rounded constants, such as degrees to radians.
CONVERSION_TOLERANCE = Fraction(1, 10**9)


class Equality(enum.Enum):
    """What is known of two answers."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNDECIDED = "undecided"


def magnitudes(prediction: Answer, gold: Answer) -> list[tuple[Fraction, Fraction]]:
    """The pairs of numbers that two answers with values may be read as, in the gold's unit.

    One pair, but for a unit without dimension on one side only: 12 % is 12 and 0.12.
    """
    if prediction.value is None or gold.value is None:
        raise ValueError("magnitudes: both answers must have a value")
    raw = (prediction.value, gold.value)
    theirs, ours = prediction.unit, gold.unit
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


def numbers_equal(prediction: Answer, gold: Answer) -> bool:
    """Whether two answers with values are the same number, exactly or by conversion."""
    converted = prediction.unit != gold.unit
    for a, b in magnitudes(prediction, gold):
        if a == b or converted and a.denominator * b.denominator > 10**12:
            if abs(a - b) <= CONVERSION_TOLERANCE * abs(b):
                return True
    return False


def named(node: Node) -> bool:
    """Whether the left side of an equation is a number or a name such as ``x`` or ``f(2)``."""
    if node[0] == "multiply":
        return named(node[1]) and named(node[2])
    return node[0] in ("symbol", "number")


def side(node: Node, other: Node) -> Node:
    """The last side of ``x = 5`` beside an answer that is no equation."""
    if node[0] == "equals" and other[0] != "equals" and named(node[1]):
        return node[-1]
    return node


def unequal_numbers(left: Node, right: Node) -> bool:
    """Whether two nodes are numbers, or tuples of numbers, known to differ."""
    if left[0] == right[0] == "number":
        return bool(left[1] != right[1])
    if left[0] == right[0] == "tuple":
        if len(left) != len(right):
            return True
        pairs = list(zip(left[1:], right[1:], strict=True))
        return any(unequal_numbers(a, b) for a, b in pairs)
    return False


def mentions_infinity(node: Any) -> bool:
    """Whether infinity is part of an expression, which may then have no value."""
    return node == "infinity" or isinstance(node, tuple) and any(map(mentions_infinity, node))


def compare(
    prediction: Answer, gold: Answer, deadline: float, pool: Pool | None = None
) -> Equality:
    """Whether the expressions of two answers are equal, units apart unless both are numbers.

    Args:
        prediction, gold: from :func:`vps.verify.extract_answer`.
        deadline: in ``time.monotonic()``; without a verdict by then it is undecided.
        pool: the workers to ask; the default pool if ``None``.

    Raises:
        ImportError: a package of the extra ``verify`` is needed and missing.
    """
    if prediction.undecidable or gold.undecidable:
        return Equality.UNDECIDED
    theirs, ours = expression(prediction), expression(gold)
    if ours is None:
        return compare_words(prediction, gold)
    if theirs is None:
        return Equality.DIFFERENT
    theirs, ours = side(theirs, ours), side(ours, theirs)
    if theirs[0] == ours[0] == "number":
        return Equality.EQUAL if numbers_equal(prediction, gold) else Equality.DIFFERENT
    if gold.unit and prediction.unit != gold.unit:
        return Equality.UNDECIDED
    if theirs == ours and theirs[0] != "latex" and not mentions_infinity(theirs):
        return Equality.EQUAL
    if unequal_numbers(theirs, ours):
        return Equality.DIFFERENT
    found = (pool or default_pool()).ask({"left": theirs, "right": ours}, deadline)
    return Equality(found["verdict"]) if found else Equality.UNDECIDED


def expression(answer: Answer) -> Node | None:
    """The node to compare: parsed, or LaTeX for the worker to parse."""
    if answer.expression is not None:
        return answer.expression
    return ("latex", answer.latex) if answer.latex else None


def compare_words(prediction: Answer, gold: Answer) -> Equality:
    """The same words are equal; other words may still mean the same."""
    same = gold.words and gold.words == prediction.words
    return Equality.EQUAL if same and gold.words not in ("nan", "inf") else Equality.UNDECIDED
