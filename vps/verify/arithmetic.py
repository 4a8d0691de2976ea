"""Exact arithmetic on text that never takes long: sizes are checked before anything is computed.

Text becomes tokens of a short list, tokens become Python source of strings, signs and three names,
and its syntax tree is worked out on fractions; nothing else of Python is reached.
"""

from __future__ import annotations

import ast
import math
import re
from fractions import Fraction

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
SIGNS = {"^": "**", "!": ".f", "{": "(", "[": "(", "}": ")", "]": ")", "x": "*", "X": "*"}
REPEATING = re.compile(r"(\d{0,9})\.(\d{0,9})\\overline\{(\d{1,9})\}")
# LaTeX to plain signs, from the inside out; no fraction is mixed but one below 1 after a number.
SHORT_FRACTION = re.compile(r"\\frac\s{0,3}(\d)\s{0,3}(\d|(?=\{))")
MIXED = re.compile(
    r"(?<![\d./^])(?<![/^]\s)(\d{1,9})(?:\s{1,3}(\d{1,9})/(\d{1,9})"
    r"|\s{0,3}\\frac\{(\d{1,9})\}\{(\d{1,9})\})(?![\d.^])"
)
FRACTION = re.compile(r"\\frac\s{0,3}\{([^{}]*)\}\s{0,3}\{([^{}]*)\}")
BRACES = re.compile(r"(?<!frac)(?<!frac\s)(?<!\})\{([^{}]*)\}")


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
    text = SHORT_FRACTION.sub(
        lambda short: rf"\frac{{{short[1]}}}" + (f"{{{short[2]}}}" if short[2] else ""),
        REPEATING.sub(repeating, text),
    )
    text = MIXED.sub(mixed, text)
    for _ in range(MAX_DEPTH if "{" in text else 0):
        text = FRACTION.sub(r"((\1)/(\2))", BRACES.sub(r"(\1)", text))
    source = [""]
    position = bars = 0
    while token := TOKEN.match(text, position):
        position, piece = token.end(), token[token.lastgroup or 0].lstrip("\\")
        if len(source) > MAX_TOKENS:
            raise UndecidableError("too many tokens")
        operand = source[-1][-1:] in (")", "f")
        if token["number"]:
            if source[-1].endswith('")'):
                return None  # two numbers in a row
            piece = f'("{piece}")'
        elif piece == "|":
            bars += -1 if operand else 1
            piece = ")" if operand else "abs("
        piece = SIGNS.get(piece, piece)
        source.append("*" + piece if operand and piece[0] in "(as" else piece)
    if text[position:].strip() or bars:
        return None
    try:
        return worked_out(ast.parse("".join(source), mode="eval").body)
    except (SyntaxError, MemoryError, RecursionError):
        return None


def repeating(match: re.Match[str]) -> str:
    r"""Return ``0.1\overline{6}`` as a fraction."""
    whole, fixed, repeated = match.groups()
    nines = "9" * len(repeated) + "0" * len(fixed)
    return f"({whole or 0}+({int(fixed + repeated) - int(fixed or 0)})/{nines})"


def mixed(match: re.Match[str]) -> str:
    r"""Return ``1 3/4`` or ``1\frac{3}{4}`` as a sum; no other fraction is mixed."""
    whole, above, below = (part for part in match.groups() if part)
    return f"({whole}+{above}/{below})" if 0 < int(above) < int(below) else match[0]


def worked_out(node: ast.expr) -> Fraction | None:
    """Return the value of a syntax tree of numbers, signs, roots and factorials."""
    match node:
        case ast.Constant(value=str(text)):
            return literal(text)
        case ast.BinOp(left=first, op=sign, right=second):
            left, right = worked_out(first), worked_out(second)
            return None if left is None or right is None else combined(left, sign, right)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=inner):
            value = worked_out(inner)
            return -value if value is not None and isinstance(sign, ast.USub) else value
        case ast.Attribute(value=inner, attr=name) | ast.Call(func=ast.Name(id=name), args=[inner]):
            value = worked_out(inner)
            if value is None or name == "abs":
                return value and abs(value)
            if name == "sqrt":
                return root(value, 2)
            return factorial(value) if name == "f" else None
    return None


def literal(text: str) -> Fraction:
    """Return the value of ``1,234.5`` or ``1e-3``, of up to 1000 digits."""
    mantissa, _, exponent = text.replace(",", "").lower().partition("e")
    if len(mantissa) > MAX_DIGITS or len(exponent) > 5 or abs(int(exponent or 0)) > MAX_EXPONENT:
        raise UndecidableError(f"number of {len(text)} characters")
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def bits(value: Fraction) -> int:
    """Return the length of numerator and denominator."""
    return value.numerator.bit_length() + value.denominator.bit_length()


def combined(left: Fraction, sign: ast.operator, right: Fraction) -> Fraction | None:
    """Return a sum, product, quotient or power of up to 8192 bits."""
    match sign:
        case ast.Add():
            value = left + right
        case ast.Sub():
            value = left - right
        case ast.Mult():
            value = left * right
        case ast.Div() if right:
            value = left / right
        case ast.Pow():
            return power(left, right)
        case _:
            raise UndecidableError("division by zero")
    if bits(value) > MAX_BITS:
        raise UndecidableError("value too long")
    return value


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
