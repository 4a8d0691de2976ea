"""Units: recognized by name in text, converted by pint, which sees known names only (SPEC §9)."""

from __future__ import annotations

import os
import re
import threading
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from vps.verify.limits import UndecidableError
from vps.verify.missing import missing
from vps.verify.unit_names import KNOWN, OFFSET, lookup

MAX_EXPONENT = 9
MAX_FACTORS = 6

# Pairs of pint's name and exponent, sorted: (("meter", 1), ("second", -2)).
Unit = tuple[tuple[str, int], ...]

PERCENT: Unit = (("percent", 1),)

DEGREES = re.compile(r"(?:°|degrees?\b)[ \t]{0,3}(C|F|K|[Cc]elsius|[Ff]ahrenheit)(?![A-Za-z])")
WORD = re.compile(r"°|%|[A-Za-zμΩ]{1,20}(?![A-Za-zμΩ])")
POWER = re.compile(
    r"[ \t]{0,3}(?:\^|\*\*)[ \t]{0,3}(?:\{(-?\d{1,4})\}|\((-?\d{1,4})\)|(-?\d{1,4}))(?![\w.{(])"
)
SPOKEN_POWER = re.compile(r"[ \t]{1,3}(squared|cubed)(?![A-Za-z])", re.IGNORECASE)
SHAPE = re.compile(r"(square|sq\.?|cubic|cu\.?)[ \t]{1,3}", re.IGNORECASE)
DIVIDED = re.compile(r"[ \t]{0,3}(?:/|(?<=[ \t])per(?=[ \t]))[ \t]{0,3}", re.IGNORECASE)
MULTIPLIED = re.compile(r"[ \t]{0,3}\*(?!\*)[ \t]{0,3}|[ \t]{1,3}|-(?=[A-Za-z])")
WORD_FOLLOWS = re.compile(r"[ \t]+[A-Za-z\d]")


class Match(NamedTuple):
    """A unit found in text and where it ends."""

    unit: Unit
    end: int


class Scale(NamedTuple):
    """A unit in base units: ``base = factor · magnitude + zero``."""

    dimension: tuple[tuple[str, Fraction], ...]
    factor: Fraction
    zero: Fraction


def match(text: str, start: int) -> Match | None:
    """The unit that begins at ``start``, such as ``m/s^2`` or ``square feet``.

    A known name with a power that is no integer from -9 to 9 makes the whole no unit.
    """
    exponents: dict[str, int] = {}
    position, sign, grouped = start, 1, False
    end = None
    for _ in range(MAX_FACTORS):
        found = factor(text, position)
        if found is None:
            break
        name, exponent, position = found
        exponents[name] = exponents.get(name, 0) + sign * exponent
        end = position
        if grouped and text[position : position + 1] == ")":
            grouped, position = False, position + 1
            end = position
        divided = DIVIDED.match(text, position)
        multiplied = None if divided else MULTIPLIED.match(text, position)
        if divided:
            position, sign = divided.end(), -1
            if text[position : position + 1] == "(":
                grouped, position = True, position + 1
        elif multiplied:
            # a / b · c is (a / b) · c, a / (b · c) is not.
            position, sign = multiplied.end(), sign if grouped else 1
        else:
            break
    if end is None or re.match(r"[ \t]{0,3}(?:\^|\*\*)", text[end : end + 6]):
        return None
    if max(map(abs, exponents.values())) > MAX_EXPONENT:
        return None
    unit = tuple(sorted((name, e) for name, e in exponents.items() if e))
    if not unit or (len(unit) > 1 or unit[0][1] != 1) and OFFSET & {name for name, _ in unit}:
        return None
    return Match(unit, end)


def factor(text: str, start: int) -> tuple[str, int, int] | None:
    """Name, exponent and end of one factor of a unit."""
    degrees = DEGREES.match(text, start)
    if degrees:
        scale = degrees[1][0].upper()
        return lookup(f"°{scale}") or "", 1, degrees.end()
    exponent = 1
    shape = SHAPE.match(text, start)
    if shape:
        exponent = 2 if shape[1][0] in "sS" else 3
        start = shape.end()
    word = WORD.match(text, start)
    name = lookup(word[0]) if word else None
    if word is None or name is None:
        return None
    end = word.end()
    if word[0] == "in" and WORD_FOLLOWS.match(text, end):
        return None  # "5 in total"
    power = POWER.match(text, end)
    if power:
        exponent *= int(power[1] or power[2] or power[3])
        return (name, exponent, power.end()) if abs(exponent) <= MAX_EXPONENT else None
    spoken = SPOKEN_POWER.match(text, end)
    if spoken:
        return name, exponent * (2 if spoken[1][0] in "sS" else 3), spoken.end()
    return name, exponent, end


_registry: Any = None
_registry_lock = threading.Lock()


def unlock() -> None:
    """A lock that a thread held during a fork would stay locked in the child."""
    global _registry_lock
    _registry_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=unlock)


def registry() -> Any:
    """pint's registry with exact fractions, made once (0.3 s)."""
    global _registry
    with _registry_lock:
        if _registry is None:
            try:
                import pint
            except ImportError:
                raise missing("units", "pint") from None
            _registry = pint.UnitRegistry(non_int_type=Fraction, cache_folder=None)
        return _registry


@lru_cache(maxsize=1024)
def scale(unit: Unit) -> Scale:
    """Dimension and conversion to base units.

    Raises:
        ValueError: a name that is not in the table, or an exponent beyond ±9.
        UndecidableError: pint has no conversion.
        ImportError: pint is missing.
    """
    for name, exponent in unit:
        if name not in KNOWN or not 0 < abs(exponent) <= MAX_EXPONENT:
            raise ValueError(f"vps.verify: no unit that is known: {name}^{exponent}")
    if unit == PERCENT:
        return Scale((), Fraction(1, 100), Fraction(0))
    units = registry()
    with _registry_lock:
        try:
            product = units.Unit("")
            for name, exponent in unit:
                product = product * units.Unit(name) ** exponent
            zero, one = (
                Fraction(units.Quantity(Fraction(value), product).to_base_units().magnitude)
                for value in (0, 1)
            )
            dimension = sorted(
                (str(base), Fraction(power)) for base, power in product.dimensionality.items()
            )
        except Exception as error:  # pint has no common base of its errors
            raise UndecidableError(f"pint: {error}") from None
    return Scale(tuple(dimension), one - zero, zero)


def same_dimension(unit: Unit | None, other: Unit | None) -> bool:
    """Whether two units measure the same; no unit is a number without dimension."""
    if unit == other:
        return True
    return dimension(unit) == dimension(other)


def dimension(unit: Unit | None) -> tuple[tuple[str, Fraction], ...]:
    """Base dimensions with their powers; empty for a plain number."""
    return scale(unit).dimension if unit else ()


def convert(magnitude: Fraction, unit: Unit, to: Unit) -> Fraction:
    """``magnitude`` of ``unit`` expressed in ``to``, of the same dimension.

    Raises:
        ValueError: the dimensions differ.
        UndecidableError, ImportError: as for :func:`scale`.
    """
    if unit == to:
        return magnitude
    source, target = scale(unit), scale(to)
    if source.dimension != target.dimension:
        raise ValueError(f"vps.verify: {unit} and {to} have different dimensions")
    return (source.factor * magnitude + source.zero - target.zero) / target.factor


def to_base(magnitude: Fraction, unit: Unit) -> Fraction:
    """``magnitude`` in base units."""
    source = scale(unit)
    return source.factor * magnitude + source.zero
