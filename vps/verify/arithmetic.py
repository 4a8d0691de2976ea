"""Exact arithmetic on text that never takes long: sizes are checked before anything is computed.

Text becomes tokens of a short list, tokens become a Python expression of names alone, and its
syntax tree is worked out on fractions; nothing else of Python is reached.
"""

from __future__ import annotations

import ast
import math
import re
from fractions import Fraction
from itertools import pairwise

MAX_TOKENS = 256
MAX_DEPTH = 40
MAX_DIGITS = 1000
MAX_EXPONENT = 1000
MAX_BITS = 8192
MAX_FACTORIAL = 170

LITERAL = (
    r"(?:\d{1,3}(?:,\d{3})++(?![\d,])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+(?![A-Za-z\d]))?"
)
REPEATING = r"\d{0,9}\.\d{0,9}\\overline\{\d{1,9}\}"
# What arithmetic is made of; an x counts between numbers only.
TOKEN = re.compile(
    rf"\s*(?:(?P<repeating>{REPEATING})|(?P<number>{LITERAL})|(?P<name>\\?(?:frac|sqrt|abs)(?![A-Za-z]|\s*\[))"
    r"|(?P<times>(?<=[\d)}\s])(?<!\b0)[xX](?=\s{0,3}[\d(\\.]))|(?P<sign>\*\*|[-+*/^()\[\]{}!|]))"
)
SHORT_FRACTION = re.compile(r"\\frac\s{0,3}(\d)\s{0,3}(?:(\d)|(?=\{))")
MIXED = re.compile(
    r"(?<![\d./^])(?<![/^]\s)(\d{1,9})(?:\s{1,3}(\d{1,9})/(\d{1,9})|\s{0,3}\\frac\{(\d{1,9})\}\{(\d{1,9})\})"
    r"(?![\d.^])"
)
OPENING, CLOSING = "([{", ")]}"
CALLS = ("sqrt", "abs", "frac")


class UndecidableError(ValueError):
    """An expression without a value, or with one that is not worked out: too large, too deep."""


def end(text: str, start: int) -> int:
    """Return where the stretch of arithmetic ends that begins at ``start``."""
    while match := TOKEN.match(text, start):
        start = match.end()
    return start


def evaluate(text: str) -> Fraction | None:
    """Work out ``text``; ``None`` where it is no arithmetic or its value is not rational.

    Args:
        text: numbers, signs, brackets, ``!``, ``|a|``, ``sqrt`` and ``\\frac`` in any notation.

    Raises:
        UndecidableError: too long, too deep, without a value, or a step is too large.
    """
    source: list[str] = []
    values: dict[str, Fraction] = {}
    depth, bars, position = 0, 0, 0
    text = MIXED.sub(mixed, SHORT_FRACTION.sub(lambda m: rf"\frac{{{m[1]}}}{braced(m[2])}", text))
    while token := TOKEN.match(text, position):
        position = token.end()
        if len(source) >= MAX_TOKENS or depth > MAX_DEPTH:
            raise UndecidableError("too many tokens or brackets")
        piece = token[token.lastgroup or 0]
        if token.lastgroup in ("number", "repeating"):
            piece = f"n{len(values)}"
            values[piece] = literal(token[token.lastgroup])
        elif token.lastgroup == "name":
            piece = piece.lstrip("\\")
        elif piece == "|":
            opens = not source or source[-1] in ("(", "*", "+", "-", "/", "**")
            bars += 1 if opens else -1
            piece = "abs(" if opens else ")"
        else:
            depth += (piece in OPENING) - (piece in CLOSING)
            piece = {"^": "**", "!": ".f"}.get(piece, piece)
            piece = "(" if piece in OPENING else ")" if piece in CLOSING else piece
            piece = "*" if token.lastgroup == "times" else piece
        source.append(piece)
    if text[position:].strip() or not values or bars:
        return None
    tree = parsed(source)
    return None if tree is None else worked_out(tree, values)


def braced(digit: str | None) -> str:
    """Put a digit into braces."""
    return f"{{{digit}}}" if digit else ""


def mixed(match: re.Match[str]) -> str:
    r"""Return ``1 3/4`` or ``1\frac{3}{4}`` as a sum; no other fraction is mixed."""
    whole, *parts = (part for part in match.groups() if part)
    proper = 0 < int(parts[0]) < int(parts[1])
    return f"({whole}+{parts[0]}/{parts[1]})" if proper else match[0]


def parsed(source: list[str]) -> ast.expr | None:
    """Return the syntax tree of tokens, with signs where a product has none."""
    pieces = source[:1]
    for before, after in pairwise(source):
        ends = before[0] == "n" or before in (")", ".f")
        if ends and after[0] in "nsaf" or before[0] == "n" and after == "(":
            if before[0] == after[0] == "n":
                return None  # two numbers in a row
            pieces.append("*")
        elif before in (")", ".f") and after == "(":
            pieces.append("@")  # a product, or the second argument of \frac
        elif before == "sqrt" and after[0] == "n":
            pieces += ["(", after, ")"]
            continue
        pieces.append(after)
    try:
        return ast.parse(second_arguments(pieces), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError):
        return None


def second_arguments(pieces: list[str]) -> str:
    r"""Join tokens; ``@`` is a comma within ``\frac``, and a product elsewhere."""
    opened: list[bool] = []
    closed_fraction = False
    joined: list[str] = []
    for before, piece in zip(["", *pieces], pieces, strict=False):
        if piece == "@":
            joined.append("" if closed_fraction else "*")
            continue
        if piece in ("(", "abs("):
            opened.append(before == "frac")
        closed_fraction = piece == ")" and bool(opened) and opened.pop()
        joined.append(piece)
    return "".join(joined)


def worked_out(node: ast.expr, values: dict[str, Fraction]) -> Fraction | None:
    """Return the value of a syntax tree of names, signs, roots and factorials."""
    match node:
        case ast.Name(id=name):
            return values.get(name)
        case ast.Call(func=ast.Call(func=ast.Name(id="frac"), args=[above]), args=[below]):
            node = ast.BinOp(above, ast.Div(), below)
        case ast.Call(func=ast.Name(id=name), args=[argument]) if name in CALLS[:2]:
            value = worked_out(argument, values)
            return None if value is None else abs(value) if name == "abs" else root(value, 2)
        case ast.Attribute(value=operand):
            value = worked_out(operand, values)
            return None if value is None else factorial(value)
        case ast.UnaryOp(op=op, operand=operand):
            value = worked_out(operand, values)
            return None if value is None else -value if isinstance(op, ast.USub) else value
    if not isinstance(node, ast.BinOp):
        return None
    left, right = worked_out(node.left, values), worked_out(node.right, values)
    if left is None or right is None:
        return None
    match node.op:
        case ast.Add():
            return bounded(left + right)
        case ast.Sub():
            return bounded(left - right)
        case ast.Mult():
            return bounded(left * right)
        case ast.Div() if right == 0:
            raise UndecidableError("division by zero")
        case ast.Div():
            return bounded(left / right)
        case ast.Pow():
            return power(left, right)
    return None


def literal(text: str) -> Fraction:
    r"""Return the value of ``1,234.5``, ``1e-3`` or ``0.1\overline{6}``.

    Raises:
        UndecidableError: more than 1000 digits, or an exponent beyond ±1000.
    """
    if "\\" in text:
        fixed, repeated = text.rstrip("}").split(r"\overline{")
        start = Fraction(f"{fixed or '0'}0" if "." in fixed else fixed)
        digits = len(fixed.partition(".")[2])
        return start + Fraction(int(repeated), (10 ** len(repeated) - 1) * 10**digits)
    mantissa, _, exponent = text.replace(",", "").lower().partition("e")
    if len(mantissa) > MAX_DIGITS or len(exponent) > 5 or abs(int(exponent or 0)) > MAX_EXPONENT:
        raise UndecidableError(f"number of {len(text)} characters")
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def bits(value: Fraction) -> int:
    """Return the length of numerator and denominator."""
    return value.numerator.bit_length() + value.denominator.bit_length()


def bounded(value: Fraction) -> Fraction:
    """Return ``value`` if it is of a size to go on with.

    Raises:
        UndecidableError: longer than 8192 bits.
    """
    if bits(value) > MAX_BITS:
        raise UndecidableError("value too long")
    return value


def power(base: Fraction, exponent: Fraction) -> Fraction | None:
    """Return a power; ``None`` where it is not rational.

    Raises:
        UndecidableError: 0 to a power that is not positive, or the result too long.
    """
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
    return bounded(base ** int(exponent))


def factorial(value: Fraction) -> Fraction:
    """Return ``n!`` for integers up to 170.

    Raises:
        UndecidableError: any other value.
    """
    if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
        raise UndecidableError("factorial of a number that is no integer from 0 to 170")
    return Fraction(math.factorial(int(value)))


def root(value: Fraction, degree: int) -> Fraction | None:
    """Return the exact root of a number that is not negative, where there is one."""
    if value < 0:
        return None
    if degree == 2:
        found = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    elif bits(value) > 1000:
        return None
    else:
        above = round(value.numerator ** (1 / degree))
        below = round(value.denominator ** (1 / degree))
        found = Fraction(above, below)
    return found if found**degree == value else None
