"""Units: recognized by name in text, converted by pint, which sees known names only (SPEC §9).

Money is a unit too, with conversions of its own: cents are dollars.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from vps.verify.arithmetic import UndecidableError

MAX_EXPONENT = 9
MAX_FACTORS = 6

# Pairs of pint's name and exponent, sorted: (("meter", 1), ("second", -2)).
Unit = tuple[tuple[str, int], ...]

PERCENT: Unit = (("percent", 1),)
LONG_PREFIXES = "nano micro micro milli centi deci kilo mega giga tera".split()
PREFIXES = dict(zip("nuμmcdkMGT", LONG_PREFIXES, strict=True))
TABLE = Path(__file__).with_name("units.txt")
# Names that may stand for another one, where the other answer has that.
EITHER = {"pound": ("sterling",), "yen_sign": ("yen", "yuan")}

FACTOR = re.compile(
    r"(?P<square>(?:square|sq\.?)[ \t]{1,3}|平方)?(?P<cubic>(?:cubic|cu\.?)[ \t]{1,3}|立方)?"
    r"(?:(?:°|degrees?\b)[ \t]{0,3}(?P<scale>[CFK]|celsius|fahrenheit)(?![A-Za-z])"
    r"|(?P<word>[°%$¢€£¥₹₽₩]|US\$|[^\W\d_]{1,20}(?![^\W\d_])))"
    r"(?:[ \t]{0,3}(?:\^|\*\*)[ \t]{0,3}[{(]?(?P<power>-?\d{1,4})[)}]?(?![\w.{(])"
    r"|[ \t]{1,3}(?P<squared>squared)(?![A-Za-z])|[ \t]{1,3}(?P<cubed>cubed)(?![A-Za-z]))?",
    re.IGNORECASE,
)
JOINT = re.compile(
    r"[ \t]{0,3}(?P<divided>/|(?<=[ \t])per(?=[ \t]))[ \t]{0,3}(?P<grouped>\(?)"
    r"|[ \t]{0,3}\*(?!\*)[ \t]{0,3}|[ \t]{1,3}|-(?=[A-Za-z])",
    re.IGNORECASE,
)
WORD_FOLLOWS = re.compile(r"[ \t]+[A-Za-z\d]")


def spellings(table: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the symbols and the names in small letters of a table, each with pint's name."""
    symbols: dict[str, str] = {}
    prefixed: dict[str, str] = {}
    names: dict[str, str] = {}
    for line in table.strip().splitlines():
        short, _, long = line.partition("|")
        canonical, *written = short.split()
        for symbol, _, prefixes in (word.partition(":") for word in written):
            symbols[symbol] = canonical
            prefixed |= {prefix + symbol: PREFIXES[prefix] + canonical for prefix in prefixes}
        for name in long.split():
            for prefix in LONG_PREFIXES if name.endswith("+") else ():
                names[prefix + name[:-1]] = prefix + canonical
            names[name.rstrip("+")] = canonical
    return prefixed | symbols, names | {f"{name}s": found for name, found in names.items()}


PHYSICAL, FINANCIAL = TABLE.read_text(encoding="utf-8").split("\n# Money")
SYMBOLS, NAMES = spellings(PHYSICAL.partition("prefixes.\n")[2])
MONEY_SYMBOLS, MONEY_NAMES = spellings(FINANCIAL.partition("\n")[2])
KNOWN = frozenset(SYMBOLS.values()) | frozenset(NAMES.values())
MONEY = frozenset(MONEY_SYMBOLS.values())
# Measured from a zero of their own, so without powers or products.
OFFSET = frozenset({"degree_Celsius", "degree_Fahrenheit"})


def lookup(word: str) -> str | None:
    """Return pint's name for a unit as it is written; ``None`` where it is another word."""
    return SYMBOLS.get(word) or NAMES.get(word.lower())


def currency(word: str) -> str | None:
    """Return our name for money as it is written; ``None`` where it is another word."""
    return MONEY_SYMBOLS.get(word) or MONEY_NAMES.get(word.lower())


class Match(NamedTuple):
    """A unit found in text and where it ends."""

    unit: Unit
    end: int


class Scale(NamedTuple):
    """A unit in base units: ``base = factor · magnitude + zero``."""

    dimension: tuple[tuple[str, Fraction], ...]
    factor: Fraction
    zero: Fraction

    def base(self, magnitude: Fraction) -> Fraction:
        """Express ``magnitude`` in base units."""
        return self.factor * magnitude + self.zero


def match(text: str, start: int) -> Match | None:
    """Return the unit that begins at ``start``, such as ``m/s^2`` or ``square feet``.

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
        joint = JOINT.match(text, position)
        if joint is None:
            break
        # a / b · c is (a / b) · c, a / (b · c) is not.
        position, sign = joint.end(), -1 if joint["divided"] else sign if grouped else 1
        grouped = grouped or bool(joint["grouped"])
    if end is None or re.match(r"[ \t]{0,3}(?:\^|\*\*)", text[end : end + 6]):
        return None
    if max(map(abs, exponents.values())) > MAX_EXPONENT:
        return None
    unit = tuple(sorted((name, e) for name, e in exponents.items() if e))
    if not unit or (len(unit) > 1 or unit[0][1] != 1) and OFFSET & {name for name, _ in unit}:
        return None
    return Match(unit, end)


def factor(text: str, start: int) -> tuple[str, int, int] | None:
    """Return name, exponent and end of one factor of a unit."""
    found = FACTOR.match(text, start)
    if found is None:
        return None
    word = f"°{found['scale'][0].upper()}" if found["scale"] else found["word"]
    name = lookup(word) or currency(word)
    if name is None or word == "in" and WORD_FOLLOWS.match(text, found.end()):
        return None  # "5 in total"
    exponent = int(found["power"] or 1)
    exponent *= 2 if found["square"] or found["squared"] else 1
    exponent *= 3 if found["cubic"] or found["cubed"] else 1
    return (name, exponent, found.end()) if abs(exponent) <= MAX_EXPONENT else None


@cache
def registry() -> Any:
    """Return pint's registry with exact fractions (0.3 s the first time)."""
    try:
        import pint
    except ImportError:
        raise ImportError(
            "vps.verify: units needs pint, which is not installed: "
            "pip install 'vps-kernels[verify]'"
        ) from None
    made: Any = pint.UnitRegistry(non_int_type=Fraction, cache_folder=None)
    for name in MONEY - {"us_cent"}:
        made.define(f"{name} = [{name}]")
    made.define("us_cent = dollar / 100")
    return made


@lru_cache(maxsize=1024)
def scale(unit: Unit | None) -> Scale:
    """Return the dimension of a unit and its conversion to base units; no unit is a plain number.

    Raises:
        ValueError: a name that is not in the table, or an exponent beyond ±9.
        UndecidableError: pint has no conversion.
        ImportError: pint is missing.
    """
    for name, exponent in unit or ():
        if name not in KNOWN | MONEY or not 0 < abs(exponent) <= MAX_EXPONENT:
            raise ValueError(f"vps.verify: no unit that is known: {name}^{exponent}")
    if unit is None or unit == PERCENT:
        return Scale((), Fraction(1, 100 if unit else 1), Fraction(0))
    try:
        product = registry().Unit("")
        for name, exponent in unit:
            product = product * registry().Unit(name) ** exponent
        zero, one = (
            Fraction(registry().Quantity(Fraction(value), product).to_base_units().magnitude)
            for value in (0, 1)
        )
    except ImportError:
        raise
    except Exception as error:  # pint has no common base of its errors
        raise UndecidableError(f"pint: {error}") from None
    dimension = sorted((str(base), Fraction(n)) for base, n in product.dimensionality.items())
    return Scale(tuple(dimension), one - zero, zero)


def resolved(unit: Unit | None, other: Unit | None) -> Unit | None:
    """Return ``unit``, or ``other`` where a word may mean either: pounds are weight and money."""
    if unit and other and len(unit) == len(other) == 1 and unit[0][1] == other[0][1]:
        if other[0][0] in EITHER.get(unit[0][0], ()):
            return other
    return unit


def is_money(unit: Unit | None) -> bool:
    """Tell whether a unit is an amount of money, which may be left out of an answer."""
    return unit is not None and len(unit) == 1 and unit[0][0] in MONEY and unit[0][1] == 1


def same_dimension(unit: Unit | None, other: Unit | None) -> bool:
    """Tell whether two units measure the same; no unit is a number without dimension."""
    return unit == other or scale(unit).dimension == scale(other).dimension


def smaller(unit: Unit, other: Unit) -> bool:
    """Tell whether a unit is smaller than another of its dimension; none with a zero is."""
    try:
        ours, theirs = scale(unit), scale(other)
    except UndecidableError:
        return False
    same = ours.dimension == theirs.dimension and not ours.zero and not theirs.zero
    return bool(ours.dimension) and same and ours.factor < theirs.factor


def convert(magnitude: Fraction, unit: Unit | None, to: Unit | None) -> Fraction:
    """Express ``magnitude`` of ``unit`` in ``to``, of the same dimension.

    Raises:
        ValueError: the dimensions differ.
        UndecidableError, ImportError: as for :func:`scale`.
    """
    source, target = scale(unit), scale(to)
    if source.dimension != target.dimension:
        raise ValueError(f"vps.verify: {unit} and {to} have different dimensions")
    return (source.base(magnitude) - target.zero) / target.factor
