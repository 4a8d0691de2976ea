"""What answer a text gives: marks in their order, notations of numbers, units."""

from fractions import Fraction

import pytest

from vps.verify import extract_answer, extract_number
from vps.verify.text import LIMIT, clean
from vps.verify.units import KNOWN, OFFSET, convert, lookup, match, scale

NUMBERS = [
    ("42", 42),
    ("42.", 42),
    ("#### 42", 42),
    ("16 - 3 = 13\n#### 13", 13),
    ("####42 apples, of 50", 42),
    (r"\boxed{42}", 42),
    (r"\boxed{42", 42),
    (r"\fbox{42} and 7", 42),
    (r"\boxed{1} then \boxed{2}, 3", 2),
    (r"\boxed{5} and \boxed{}", 5),
    (r"\boxed{\boxed{5}}", 5),
    (r"{ \boxed{5} 6", 5),
    (r"\boxed{x = \frac{1}{2}} 9", Fraction(1, 2)),
    (r"\boxed{\text{5 apples}}", 5),
    (r"\boxed{42} #### 43", 42),
    ("#### 42\nThe answer is 43.", 42),
    ("The answer is 42. Not 43.", 42),
    ("the ANSWER IS: 42", 42),
    ("The answer is:\n\n42", 42),
    ("The answer is 1. No, the answer is 2", 2),
    ("Answer: 42", 42),
    ("**Answer:** 42, as 6 * 7", 42),
    ("The answer is **42**!", 42),
    ("The answer is about 5 of the 10", 5),
    ("The answer is x = 5 because 3 + 2", 5),
    ("The answer is 3 + 4 = 7.", 7),
    ("I have 3 and then 4 apples", 4),
    ("So 3 + 4 = 7.", 7),
    ("so a + b = 7 in all", 7),
    ("pages 10-15", None),
    ("10 - 5", 5),
    ("1,234.5", Fraction("1234.5")),
    ("It is 1,234,567.", 1234567),
    ("1 234 567", 1234567),
    ("1 234", 1234),
    ("1{,}234", 1234),
    (r"1,\!234", 1234),
    ("$3.50", Fraction("3.5")),
    (r"\$3.50", Fraction("3.5")),
    ("-$3.50", Fraction("-3.5")),
    ("$-3.50", Fraction("-3.5")),
    ("€5", 5),
    ("costs $5 now and $6 later", 6),
    ("$5$", 5),
    ("$5$6", 6),
    ("12%", 12),
    (r"12\%", 12),
    ("-5", -5),
    ("−5", -5),
    ("–5", -5),
    ("it is -5", -5),
    ("- 5 of them", 5),
    ("* 42", 42),
    ("+7", 7),
    ("--5", 5),
    (".5", Fraction(1, 2)),
    ("3/4", Fraction(3, 4)),
    ("-3/4", Fraction(-3, 4)),
    ("3⁄4", Fraction(3, 4)),
    ("½", Fraction(1, 2)),
    ("3½", Fraction(7, 2)),
    ("1 3/4", Fraction(7, 4)),
    (r"1\frac{3}{4}", Fraction(7, 4)),
    (r"\frac{3}{4}", Fraction(3, 4)),
    (r"\dfrac34", Fraction(3, 4)),
    (r"-\frac{1}{2}", Fraction(-1, 2)),
    ("1e-3", Fraction(1, 1000)),
    ("1E5", 100000),
    ("2.5 × 10^3", 2500),
    ("2.5 x 10^3", 2500),
    ("2.5*10**3", 2500),
    ("2.5 × 10³", 2500),
    ("2.5·10⁻³", Fraction("0.0025")),
    (r"2.5 \times 10^{3}", 2500),
    (r"2.5 \cdot 10^{-3}", Fraction("0.0025")),
    ("2.5 × 10^3 m", 2500),
    ("2^10", 1024),
    (r"\sqrt{16}", 4),
    ("√16", 4),
    ("4^(1/2)", 2),
    ("5!", 120),
    ("It is 5!", 5),
    ("|3 - 5|", 2),
    ("(3, 4)", None),
    ("5, 6, 7", None),
    ("５２", 52),
    ("٤٢", 42),
    ("४२", 42),
    ("𝟒𝟐", 42),
    ("4\u200b2", 42),
    ("\u202e42", 42),
    ("42\x00", 42),
    ("\ufeff42", 42),
    ("10:30", None),
    ("", None),
    (" \n", None),
    ("none", None),
    ("Paris", None),
    ("The answer is unknown, though 5 was said.", 5),
    ("There are 5. The answer is unknown.", None),
    ("nan", None),
    ("inf", None),
    ("-inf", None),
    (r"\infty", None),
    ("x + y", None),
    ("2x + 3", None),
    ("1/0", None),
    ("0^0", None),
    ("9**9**9**9", None),
    ("9^9^9", None),
    ("1e99999", None),
    ("171!", None),
    ("foo(9)**9**9", None),
    ("5 m**9**9**9", None),
    ("1.2.3", None),
    ("1.000.000", None),
    ("0x1F", None),
    ("1_000", None),
    (r"$\binom{5}{2}$", None),
    ("[0, 1)", None),
    (r"\sqrt{2}", None),
]


@pytest.mark.parametrize("text, number", NUMBERS, ids=lambda value: repr(value)[:40])
def test_number(text, number):
    assert extract_number(text) == number


@pytest.mark.parametrize(
    "text, source",
    [
        (r"\boxed{1} #### 2", "boxed"),
        ("#### 2\nanswer is 3", "hashes"),
        ("answer is 3", "phrase"),
        ("3", "text"),
    ],
)
def test_source(text, source):
    assert extract_answer(text).source == source


UNITS = [
    ("2 km", {"kilometer": 1}),
    ("2km.", {"kilometer": 1}),
    ("100 km/h", {"kilometer": 1, "hour": -1}),
    ("100 kilometers per hour", {"kilometer": 1, "hour": -1}),
    ("9.8 m/s²", {"meter": 1, "second": -2}),
    ("9.8 m s^-2", {"meter": 1, "second": -2}),
    (r"9.8\,\text{m/s}^2", {"meter": 1, "second": -2}),
    (r"9.8 \text{ m/s}", {"meter": 1, "second": -1}),
    ("3 J/(kg K)", {"joule": 1, "kilogram": -1, "kelvin": -1}),
    ("3 J/kg/K", {"joule": 1, "kilogram": -1, "kelvin": -1}),
    ("5 kg·m/s", {"kilogram": 1, "meter": 1, "second": -1}),
    ("5 square feet", {"foot": 2}),
    ("5 cubic meters of air", {"meter": 3}),
    ("5 meters squared", {"meter": 2}),
    ("5 µm", {"micrometer": 1}),
    ("20 °C", {"degree_Celsius": 1}),
    ("20℃", {"degree_Celsius": 1}),
    ("20 degrees Fahrenheit", {"degree_Fahrenheit": 1}),
    (r"90^\circ", {"degree": 1}),
    ("12 %", {"percent": 1}),
    ("5 in", {"inch": 1}),
    ("5 in total", None),
    ("5 m^10", None),
    ("5 m^-99999999999", None),
    ("5 apples", None),
    ("5 furlongs_", None),
    ("3m + 2", None),
    ("20 °C^2", None),
    ("5", None),
]


@pytest.mark.parametrize("text, unit", UNITS, ids=lambda value: repr(value)[:40])
def test_unit(text, unit):
    found = extract_answer(text).unit
    assert (dict(found) if found else None) == unit


def test_every_known_unit_is_one_of_pint():
    pytest.importorskip("pint")
    for name in KNOWN:
        found = scale(((name, 1),))
        assert found.factor > 0, name
        assert (found.zero != 0) == (name in OFFSET), name


CONVERSIONS = [
    (2, "km", 2000, "m"),
    (1, "in", Fraction("2.54"), "cm"),
    (60, "mph", Fraction("96.56064"), "km/h"),
    (20, "°C", 68, "°F"),
    (-40, "°C", -40, "°F"),
    (1, "hr", 3600, "s"),
    (1, "m^2", 10000, "cm^2"),
    (1, "L", 1000, "cm^3"),
    (1, "kWh", Fraction("3.6"), "MJ"),
    (1, "N", 1, "kg m/s^2"),
    (50, "%", 50, "percent"),
]


@pytest.mark.parametrize("magnitude, unit, expected, to", CONVERSIONS)
def test_conversion(magnitude, unit, expected, to):
    pytest.importorskip("pint")
    assert convert(Fraction(magnitude), match(unit, 0).unit, match(to, 0).unit) == expected


def test_conversion_between_dimensions_is_refused():
    pytest.importorskip("pint")
    with pytest.raises(ValueError, match="different dimensions"):
        convert(Fraction(1), match("kg", 0).unit, match("m", 0).unit)


@pytest.mark.parametrize("unit", [(("furlong**9", 1),), (("meter", 10),), (("meter", 0),)])
def test_only_known_units_reach_pint(unit):
    with pytest.raises(ValueError, match="no unit that is known"):
        scale(unit)


def test_words_are_no_units():
    for word in ("apples", "a", "at", "as", "are", "of", "is", "point", "dot", "USD", "m" * 5000):
        assert lookup(word) is None


def test_only_the_end_is_read():
    assert extract_number("7 " + "x" * LIMIT) is None
    assert extract_number("The answer is 7. " + "word " * 10**6 + "8") == 8
    assert extract_number("9" * 10**6) is None
    assert extract_answer("9" * 10**6).undecidable
    # A number that the cut goes through is not taken for a shorter one.
    assert extract_number("1" * 10 + " " * (LIMIT - 5)) == 1111111111
    assert extract_number("1" * 10 + "." + " word" * 818) is None
    assert len(clean("ﷺ" * LIMIT).text) <= 2 * LIMIT


@pytest.mark.parametrize("text", [None, 5, b"42", ["42"]])
def test_text_must_be_a_string(text):
    with pytest.raises(TypeError, match="text must be a str"):
        extract_number(text)
