"""Quantities in several units, ``1 h 30 min`` or ``5 ft 6 in``: their sum in the last unit."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from vps.verify import arithmetic, units
from vps.verify.limits import UndecidableError
from vps.verify.tokens import Token

MAX_PAIRS = 4


class Quantity(NamedTuple):
    """A sum in its last unit, and its first number in the text."""

    value: Fraction
    unit: units.Unit
    first: Token


def compound(tokens: Sequence[Token]) -> Quantity | None:
    """The quantity that ``tokens`` end with.

    It is at least two numbers, each with a smaller unit of the same dimension than the one
    before, with nothing but spaces or "and" between them; ``None`` where there is none.

    Raises:
        ImportError: pint is missing.
    """
    pairs: list[tuple[Token, units.Unit]] = []
    rest = list(tokens)
    while len(rest) > 1 and len(pairs) < MAX_PAIRS:
        number, unit = rest[-2:]
        if number.kind != "number" or unit.unit is None or len(unit.unit) != 1:
            break
        if pairs and not smaller(pairs[-1][1], unit.unit):
            break
        pairs.append((number, unit.unit))
        del rest[-2:]
        if rest and rest[-1].text == "and":
            rest.pop()
    if len(pairs) < 2:
        return None
    last = pairs[0][1]
    try:
        values = [
            units.convert(arithmetic.number(number.text), unit, last) for number, unit in pairs
        ]
    except UndecidableError:
        return None
    return Quantity(sum(values, Fraction(0)), last, pairs[-1][0])


def smaller(unit: units.Unit, other: units.Unit) -> bool:
    """Whether a unit is smaller than another one of its dimension; those with a zero are not."""
    try:
        ours, theirs = units.scale(unit), units.scale(other)
    except UndecidableError:
        return False
    same = ours.dimension == theirs.dimension and not ours.zero and not theirs.zero
    return bool(ours.dimension) and same and ours.factor < theirs.factor
