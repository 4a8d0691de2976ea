"""Exact arithmetic on fractions that never takes long: sizes are checked before computing."""

from __future__ import annotations

import math
from fractions import Fraction

from vps.verify.limits import (
    MAX_BITS,
    MAX_DIGITS,
    MAX_EXPONENT,
    MAX_FACTORIAL,
    UndecidableError,
)


def number(text: str) -> Fraction:
    """The value of a literal such as ``1,234.5`` or ``1e-3``.

    Raises:
        UndecidableError: more than 1000 digits, or an exponent beyond ±1000.
    """
    mantissa, _, exponent = text.replace(",", "").lower().partition("e")
    if len(mantissa) > MAX_DIGITS or len(exponent) > 5 or abs(int(exponent or 0)) > MAX_EXPONENT:
        raise UndecidableError(f"number of {len(text)} characters")
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def bits(value: Fraction) -> int:
    """Length of numerator and denominator."""
    return value.numerator.bit_length() + value.denominator.bit_length()


def bounded(value: Fraction) -> Fraction:
    """``value`` if it is of a size to go on with.

    Raises:
        UndecidableError: longer than 8192 bits.
    """
    if bits(value) > MAX_BITS:
        raise UndecidableError("value too long")
    return value


def divide(dividend: Fraction, divisor: Fraction) -> Fraction:
    """A quotient.

    Raises:
        UndecidableError: division by zero, or the result too long.
    """
    if divisor == 0:
        raise UndecidableError("division by zero")
    return bounded(dividend / divisor)


def power(base: Fraction, exponent: int) -> Fraction:
    """An integer power.

    Raises:
        UndecidableError: 0 to a power that is not positive, or the result too long.
    """
    if base == 0 and exponent <= 0:
        raise UndecidableError("zero to a power that is not positive")
    if abs(base) == 1 or base == 0:
        return base if exponent % 2 else abs(base)
    if abs(exponent) > MAX_BITS or abs(exponent) * (bits(base) - 2) > MAX_BITS:
        raise UndecidableError("power too large")
    return base**exponent


def factorial(value: Fraction) -> Fraction:
    """``n!`` for integers up to 170.

    Raises:
        UndecidableError: any other value.
    """
    if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
        raise UndecidableError("factorial of a number that is no integer from 0 to 170")
    return Fraction(math.factorial(int(value)))


def square_root(value: Fraction) -> Fraction | None:
    """The exact root where there is one."""
    if value < 0:
        return None
    numerator, denominator = math.isqrt(value.numerator), math.isqrt(value.denominator)
    root = Fraction(numerator, denominator)
    return root if root * root == value else None
