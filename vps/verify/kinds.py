"""Plain answers that all of a text is: quantities, ratios, times, dates, ranges (SPEC §9).

A text of which a part would be dropped (the 3 of ``3:2``, the million of ``3 million``, the
"not" of "not 6") is read as no number, or as undecidable.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from vps.verify import arithmetic, units
from vps.verify.arithmetic import LITERAL, UndecidableError

MAX_PAIRS = 4
MAGNITUDES = {
    **{"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9},
    **{"bn": 10**9, "trillion": 10**12, "lakh": 10**5, "crore": 10**7, "万": 10**4, "亿": 10**8},
}
MAGNITUDE = re.compile(rf"[\s-]?\s?({'|'.join(MAGNITUDES)})s?(?![A-Za-z])", re.IGNORECASE)
SIGN = re.compile(r"([-+]?)\s?(US\$|[$€£¥₹₽₩])\s?(?=-?[\d.])")
# Words before a number that leave it as it is, turn it round, or make it another one.
ABOUT = re.compile(
    r"(?:(?:(?:about|around|approximately|roughly|nearly|exactly|only|just|is|be|equals)\b"
    r"|approx\.|\\(?:approx|sim)\b|≈|=|:)\s{0,3})+",
    re.IGNORECASE,
)
MINUS = re.compile(r"(?:minus|negative)\s{1,3}", re.IGNORECASE)
CHANGED_BEFORE = re.compile(
    r"(?:\b(?:not|up|never|no|neither|nor|without|than|least|most|under|over|below|above|minus"
    r"|negative|half|third|quarter|twice|double|triple|times|except|between|out|all but)|n't|≠"
    r"|\\neq?"
    r"|(?:n't|not|never)\s(?:think|believe|say)\s(?:that\s)?(?:it|this|that|the answer)(?:'s|\sis))"
    r"\s{1,3}(?:(?:a|an|the|of|equal|to|be|exactly|about|from)\s{1,3}){0,3}[$€£¥]?$",
    re.IGNORECASE,
)
CHANGED_AFTER = re.compile(
    r"\s{0,3}(?:and\s(?:a|one|two|three)[\s-](?:half|third|quarter|fourth|fifth|tenth)|squared"
    r"|cubed|(?:[ap]\.?m\b|o'clock)|(?:or|and)\s(?:more|less|fewer|above|below|greater|higher|up)"
    r"|(?:to|through|until|till|or|out of)\s{1,3}[-$]?[\d.]"
    r"|%?\s?(?:more|less|fewer|greater)\sthan|[:;]\s?-?[\d.]|-\s?[a-z]?\d"
    r"|\stimes\s(?:as|more|less|the|\d)|\+\s*$|\s?[‰′″])",
    re.IGNORECASE,
)
ORDINAL = re.compile(r"(?:st|nd|rd|th)(?![A-Za-z])")
NOUNS = re.compile(
    r"(?:\s{0,3}[^\W\d_A-Za-z]|[^\W\d_]{4}|\s{1,3}(?:[^\W\d_]{3}|in\b|of\b|at\b|on\b|by\b))[^\W\d_]*"
    r"(?:[\s'-]{1,3}[^\W\d_]+|[.,;!?]|\([^\W\d_]+\)){0,12}\s*"
)
BETWEEN = re.compile(r"\s{0,3},?\s{0,3}(?:and\s)?\s{0,3}")
ITEM = rf"[$€£-]?(?:{LITERAL})(?:\s?[^\W\d_]{{1,12}})?"
LISTED = re.compile(rf"\(?{ITEM}(?:\s{{0,3}}(?:[,;:]|and|or|to)\s{{0,3}}{ITEM}){{1,40}}\)?")

NUMBER = rf"-?(?:{LITERAL})"
RATIO = re.compile(rf"{NUMBER}(?:\s?:\s?{NUMBER}){{1,5}}")
TIME = re.compile(
    r"(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?\s{0,3}(?:([ap])\.?m\.?|(o'clock))?", re.IGNORECASE
)
RANGE = re.compile(
    rf"(?:(?:from )?([$€£]?)({NUMBER})([^\d-]{{0,12}}?)\s?(to|through|\.\.|(?<! )-(?! ))"
    rf"|between ([$€£]?)({NUMBER})([^\d-]{{0,12}}?)\s?(and))\s?[$€£]?({NUMBER})(\D{{0,20}})",
    re.IGNORECASE,
)
BASED = re.compile(r"([0-9A-Fa-f]{1,64})_\{?\s{0,2}(\d{1,2})\s{0,2}\}?")
MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
MONTH = rf"(?P<name>(?:{'|'.join(MONTHS)})[a-z]{{0,6}})\.?"
DAY, YEAR = r"(?P<d>\d{1,2})(?:st|nd|rd|th)?", r"(?P<y>\d{4})"
DATES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{YEAR}([-/.])(?P<m>\d{{1,2}})\2(?P<d>\d{{1,2}})",
        rf"(?:{YEAR}年)?(?P<m>\d{{1,2}})月(?:(?P<d>\d{{1,2}})[日号])?",
        rf"{MONTH}\s{DAY}(?:,?\s{YEAR})?",
        rf"(?:the )?{DAY}(?: of)?\s{MONTH}(?:,?\s{YEAR})?",
        rf"{MONTH}\s{YEAR}",
        r"(?P<a>\d{1,2})[/.](?P<b>\d{1,2})[/.](?P<y>\d{2,4})",
    )
]

# What an answer may be, each with its kind's name: ("time", 17, 30, 0), ("ratio", 3/2, 1).
Parts = tuple[tuple[str | Fraction | int, ...], ...]


class ChangedError(UndecidableError):
    """A word before or after a number makes it another one."""


class Quantity(NamedTuple):
    """A number with its unit, and where in the text it ends."""

    value: Fraction
    unit: units.Unit | None
    end: int


def quantity(text: str, start: int = 0, stop: int | None = None) -> Quantity | None:
    """Read the number that begins at ``start`` with the unit that follows; ``None`` for another.

    Args:
        text: plain text.
        start: where the number begins.
        stop: where it ends at the latest.

    Raises:
        UndecidableError: too large.
        ChangedError: a word on either side changes it.
    """
    sign = SIGN.match(text, start)
    unit: units.Unit | None = None
    if sign:
        unit = ((units.currency(sign[2]) or "", 1),)
    at = sign.end() if sign else start
    end = arithmetic.end(text, at)
    end = end if stop is None else min(end, max(stop, at))
    value = arithmetic.evaluate(text[at:end])
    while value is None and text[at:end].rstrip()[-1:] in tuple("-+*/^([{|!"):
        end = at + len(text[at:end].rstrip()) - 1
        value = arithmetic.evaluate(text[at:end])
    if value is None:
        return None
    if sign and sign[1] == "-":
        value = -value
    end = at + len(text[at:end].rstrip())
    while magnitude := MAGNITUDE.match(text, end):
        value, end = value * MAGNITUDES[magnitude[1].lower()], magnitude.end()
    ordinal = ORDINAL.match(text, end)
    if ordinal:
        end = ordinal.end()
    found = unit_at(text, end)
    joint = units.JOINT.match(text, end) if sign else None
    if sign and joint and joint["divided"]:
        found = units.match(f"{sign[2]}{text[end : end + 60]}", 0)
        unit, end = (found.unit, end + found.end - len(sign[2])) if found else (unit, end)
    elif found and (unit is None or unit == found.unit):
        letter = found.end == end + 1 and text[end].isalpha()
        if letter and re.search(r"[\d)\s][-+]", text[at:end]):
            return None  # the last letter of "2 + 3m" is a variable
        unit, end = found
    if CHANGED_AFTER.match(text, end) or CHANGED_BEFORE.search(text, max(0, start - 60), start):
        raise ChangedError("another word changes the number")
    return Quantity(value, unit, end)


# What may not follow a unit; there the letter is a variable: "3m + 2", "2h(x)".
CONTINUES = re.compile(r"[ \t]*(?:[-+*^=(/]|\\[A-Za-z])[ \t]*[\w(\\]|\w")


def unit_at(text: str, position: int) -> units.Match | None:
    """Return the unit after a number, if one stands there and no formula goes on from it."""
    start = (
        position + len(text[position : position + 4]) - len(text[position : position + 4].lstrip())
    )
    found = units.match(text, start)
    return None if found is None or CONTINUES.match(text, found.end) else found


def compound(text: str, start: int = 0) -> Quantity | None:
    """Read ``1 h 30 min`` or ``5 ft 6 in``: the sum in the last unit (money: the first).

    Each must be smaller than the one before.

    Raises:
        ImportError: pint is missing.
    """
    total, end, first, last = Fraction(0), start, None, None
    for count in range(MAX_PAIRS + 1):
        at = end + len(BETWEEN.match(text, end)[0]) if count else start  # type: ignore[index]
        found = quantity(text, at) if at < len(text) else None
        unit = found.unit if found else None
        if not found or not unit or len(unit) != 1 or last and not units.smaller(unit, last):
            if count > 1 and units.is_money(first):  # dollars may be left out
                total, last = units.convert(total, last, first), first
            return Quantity(total, last, end) if count > 1 else None
        first = first or unit
        total = found.value + (units.convert(total, last, unit) if last else 0)
        end, last = found.end, unit
    return None


def structure(text: str) -> tuple[Parts, units.Unit | None] | None:
    """Read a ratio, a time, a date or a range that all of ``text`` is, with a range's unit.

    What is given back is each kind that it may be: ``10:30`` is a ratio and two times.
    """
    for pattern in DATES:
        if date := pattern.fullmatch(text):
            return dated(date.groupdict()), None
    readings: Parts = ()
    time = TIME.fullmatch(text)
    if time and (time[2] or time[4] or time[5]):
        hour, minute, second = int(time[1]), int(time[2] or 0), int(time[3] or 0)
        if time[4]:
            hour = hour % 12 + 12 * (time[4] in "pP")
        hours = (hour,) if time[4] or not 0 < hour <= 12 else (hour % 12, hour % 12 + 12)
        if hour < 24 and minute < 60:
            readings = tuple(("time", each, minute, second) for each in hours)
    if RATIO.fullmatch(text) and not re.match(r"0|.*:0\d", text):
        *terms, last = (signed(term.strip()) for term in text.split(":"))
        if last:
            readings += (("ratio", *(term / last for term in terms), 1),)
    if readings or (span := RANGE.fullmatch(text)) is None:
        return (readings, None) if readings else None
    sign, first, unit, joint = (span[at] or span[at + 4] or "" for at in range(1, 5))
    low, high, hyphen = signed(first), signed(span[9]), joint == "-"
    found = units.match(sign or span[10].strip() or unit.strip(), 0)
    named = found or not NOUNS.fullmatch(f" {unit}{span[10]}") and not (unit + span[10]).strip()
    if low >= high or hyphen and low < 0 or not (named or NOUNS.fullmatch(span[10])):
        return None
    readings = (("range", low, high), *((("ratio", low - high, 1),) if hyphen else ()))
    return readings, found.unit if found else None


def dated(found: dict[str, str | None]) -> Parts:
    """Return year, month and day, 0 where one is not said; ``5/3/2019`` may be two dates."""
    year, month, day, a, b = (int(found.get(part) or 0) for part in "ymdab")
    if a:
        years = (year,) if year > 99 else (year + 1900, year + 2000)
        return tuple(("date", each, *days) for each in years for days in ((a, b), (b, a)))
    name = found.get("name")
    return (("date", year, MONTHS.index(name[:3].lower()) + 1 if name else month, day),)


def signed(text: str) -> Fraction:
    """Return the value of a literal with its sign."""
    return -arithmetic.literal(text[1:]) if text.startswith("-") else arithmetic.literal(text)


def based(text: str) -> Fraction | None:
    """Return the value of digits with their base, ``1010_2``; ``None`` for another text."""
    found = BASED.fullmatch(text)
    if not found or not 2 <= int(found[2]) <= 16:
        return None
    try:
        return Fraction(int(found[1], int(found[2])))
    except ValueError:
        return None
