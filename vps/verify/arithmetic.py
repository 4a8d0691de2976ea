"""Exact arithmetic on text that never takes long: sizes are checked before anything is computed.

Text becomes tokens of a short list, tokens become a Python expression of names alone, and its
syntax tree is worked out on fractions; nothing else of Python is reached.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from fractions import Fraction
from operator import add, mul, sub

MAX_TOKENS = 256
MAX_DEPTH = 40
MAX_DIGITS = 1000
MAX_EXPONENT = 1000
MAX_BITS = 8192
MAX_FACTORIAL = 170

LITERAL = (
    r"(?:\d{1,3}(?:,\d{3})++(?![\d,])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+(?![A-Za-z\d]))?"
)
# What arithmetic is made of; an x counts between numbers only.
TOKEN = re.compile(
    rf"\s*(?:(?P<number>{LITERAL})|(?P<name>(?:\\?sqrt|\\frac|abs)(?![A-Za-z]|\s*\[))"
    r"|(?P<times>(?<=[\d)}\s])(?<!\b0)[xX](?=\s{0,3}[\d(\\.]))|(?P<sign>\*\*|[-+*/^()\[\]{}!|]))"
)
# LaTeX to plain signs, from the inside out.
REPEATING = re.compile(r"(\d{0,9})\.(\d{0,9})\\overline\{(\d{1,9})\}")
SHORT_FRACTION = re.compile(r"\\frac\s{0,3}(\d)\s{0,3}(\d|(?=\{))")
MIXED = re.compile(
    r"(?<![\d./^])(?<![/^]\s)(\d{1,9})(?:\s{1,3}(\d{1,9})/(\d{1,9})"
    r"|\s{0,3}\\frac\{(\d{1,9})\}\{(\d{1,9})\})(?![\d.^])"
)
FRACTION = re.compile(r"\\frac\s{0,3}\{([^{}]*)\}\s{0,3}\{([^{}]*)\}")
BRACES = re.compile(r"(?<!frac)(?<!frac\s)(?<!\})\{([^{}]*)\}")
SIGNS = {"^": "**", "!": ".f", "{": "(", "[": "(", "}": ")", "]": ")", "x": "*", "X": "*"}


class UndecidableError(ValueError):
    """An expression without a value, or with one that is not worked out: too large, too deep."""


def end(text: str, start: int) -> int:
    """Return where the stretch of arithmetic ends that begins at ``start``."""
    depth = 0
    while match := REPEATING.match(text, start) or TOKEN.match(text, start):
        depth += (match[0][-1] in "([{") - (match[0][-1] in ")]")
        if depth < 0:
            break
        start = match.end()
    return start


def evaluate(text: str) -> Fraction | None:
    """Work out ``text``; ``None`` where it is no arithmetic or its value is not rational.

    Args:
        text: numbers, signs, brackets, ``!``, ``|a|``, ``sqrt`` and ``\\frac`` in any notation.

    Raises:
        UndecidableError: too long, too deep, without a value, or a step is too large.
    """
    depth = 0
    for bracket in re.finditer(r"[()\[\]{}]", text):
        depth += 1 if bracket[0] in "([{" else -1
        if depth > MAX_DEPTH:
            raise UndecidableError("nested too deep")
    text = REPEATING.sub(repeating, text)
    text = MIXED.sub(mixed, SHORT_FRACTION.sub(short_fraction, text))
    for _ in range(MAX_DEPTH if "{" in text else 0):
        text = FRACTION.sub(r"((\1)/(\2))", BRACES.sub(r"(\1)", text))
    source: list[str] = []
    values: dict[str, Fraction] = {}
    position = bars = 0
    while token := TOKEN.match(text, position):
        position, piece = token.end(), token[token.lastgroup or 0]
        if len(source) >= MAX_TOKENS:
            raise UndecidableError("too many tokens")
        before = source[-1] if source else "("
        operand = before in (")", ".f") or before in values
        if token["number"]:
            if before in values:
                return None  # two numbers in a row
            piece = f"n{len(values)}"
            values[piece] = literal(token["number"])
        elif piece == "|":
            bars += -1 if operand else 1
            piece = ")" if operand else "abs("
        piece = SIGNS.get(piece, piece).lstrip("\\")
        if operand and (piece in values or piece in ("(", "abs(", "sqrt")):
            source.append("*")
        source += ["(", piece, ")"] if before == "sqrt" and piece in values else [piece]
    if text[position:].strip() or not values or bars:
        return None
    try:
        return worked_out(ast.parse("".join(source), mode="eval").body, values)
    except (SyntaxError, MemoryError, RecursionError):
        return None


def repeating(match: re.Match[str]) -> str:
    r"""Return ``0.1\overline{6}`` as a fraction."""
    whole, fixed, repeated = match.groups()
    nines = "9" * len(repeated) + "0" * len(fixed)
    return f"({whole or 0}+({int(fixed + repeated) - int(fixed or 0)})/{nines})"


def short_fraction(match: re.Match[str]) -> str:
    r"""Return ``\frac12`` and ``\frac1{2}`` with braces."""
    return rf"\frac{{{match[1]}}}" + (f"{{{match[2]}}}" if match[2] else "")


def mixed(match: re.Match[str]) -> str:
    r"""Return ``1 3/4`` or ``1\frac{3}{4}`` as a sum; no other fraction is mixed."""
    whole, above, below = (part for part in match.groups() if part)
    return f"({whole}+{above}/{below})" if 0 < int(above) < int(below) else match[0]


def worked_out(node: ast.expr, values: dict[str, Fraction]) -> Fraction | None:
    """Return the value of a syntax tree of names, signs, roots and factorials."""
    function: Callable[[Fraction], Fraction | None]
    match node:
        case ast.Name(id=name):
            return values.get(name)
        case ast.BinOp(left=first, right=second):
            left, right = worked_out(first, values), worked_out(second, values)
            work = BINARY.get(type(node.op))
            return None if left is None or right is None or work is None else work(left, right)
        case ast.Attribute(value=inner):
            function = factorial
        case ast.Call(func=ast.Name(id="sqrt"), args=[inner]):
            function = square_root
        case ast.Call(func=ast.Name(id="abs"), args=[inner]):
            function = abs
        case ast.UnaryOp(op=sign, operand=inner):
            function = Fraction.__neg__ if isinstance(sign, ast.USub) else Fraction
        case _:
            return None
    value = worked_out(inner, values)
    return None if value is None else function(value)


def literal(text: str) -> Fraction:
    """Return the value of ``1,234.5`` or ``1e-3``, of up to 1000 digits."""
    mantissa, _, exponent = text.replace(",", "").lower().partition("e")
    if len(mantissa) > MAX_DIGITS or len(exponent) > 5 or abs(int(exponent or 0)) > MAX_EXPONENT:
        raise UndecidableError(f"number of {len(text)} characters")
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def bits(value: Fraction) -> int:
    """Return the length of numerator and denominator."""
    return value.numerator.bit_length() + value.denominator.bit_length()


def bounded(function: Callable[[Fraction, Fraction], Fraction]) -> Callable[..., Fraction]:
    """Make a function refuse values longer than 8192 bits."""

    def checked(left: Fraction, right: Fraction) -> Fraction:
        value = function(left, right)
        if bits(value) > MAX_BITS:
            raise UndecidableError("value too long")
        return value

    return checked


def quotient(dividend: Fraction, divisor: Fraction) -> Fraction:
    """Divide, but not by zero."""
    if divisor == 0:
        raise UndecidableError("division by zero")
    return dividend / divisor


def power(base: Fraction, exponent: Fraction) -> Fraction | None:
    """Return a power of up to 8192 bits; ``None`` where it is not rational."""
    if exponent.denominator != 1:
        if abs(exponent) > MAX_EXPONENT or exponent.denominator > MAX_EXPONENT:
            raise UndecidableError(f"exponent {exponent}")
        below = root(base, exponent.denominator)
        return None if below is None else power(below, Fraction(exponent.numerator))
    if base == 0 and exponent <= 0:
        raise UndecidableError("zero to a power that is not positive")
    if abs(base) == 1 or base == 0:
        return base if exponent % 2 else abs(base)
    if abs(exponent) > MAX_BITS or abs(exponent) * (bits(base) - 2) > MAX_BITS:
        raise UndecidableError("power too large")
    return base ** int(exponent)


def factorial(value: Fraction) -> Fraction:
    """Return ``n!`` for integers up to 170."""
    if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
        raise UndecidableError("factorial of a number that is no integer from 0 to 170")
    return Fraction(math.factorial(int(value)))


def square_root(value: Fraction) -> Fraction | None:
    """Return the exact root where there is one."""
    return root(value, 2)


def root(value: Fraction, degree: int) -> Fraction | None:
    """Return the exact root of a number that is not negative, where there is one."""
    if value < 0 or degree > 2 and bits(value) > MAX_EXPONENT:
        return None
    above, below = (
        math.isqrt(part) if degree == 2 else round(part ** (1 / degree))
        for part in (value.numerator, value.denominator)
    )
    found = Fraction(above, below)
    return found if found**degree == value else None


BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | None]] = {
    **{ast.Add: bounded(add), ast.Sub: bounded(sub), ast.Mult: bounded(mul)},
    **{ast.Div: bounded(quotient), ast.Pow: power},
}
