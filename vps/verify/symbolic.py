r"""Two formulas compared by math-verify; runs in the worker only.

Math-Verify reads LaTeX and shows that formulas are equal. Ours is what it lacks: algebra in plain
text (``sqrt(x)``, ``x^(2n)``), the imaginary unit, decimals as exact numbers, inequalities joined
by "or", equations without a solution, and showing that formulas differ: numbers put in for
the variables do so. An answer is ``"equal"``, ``"different"`` or ``"undecided"``.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import Any

from vps.verify.answer import FUNCTIONS, GREEK

EQUAL, DIFFERENT, UNDECIDED = "equal", "different", "undecided"

# Values put in for variables, none of them special: fractions of both signs, small and large.
POINTS = ((7, 11), (-13, 17), (23, 5), (-19, 3))
DIGITS = 30
MAX_ELEMENTS = 16

ARC = {name: f"arc{name[1:]}" for name in ("asin", "acos", "atan")}
NAMES = "|".join([*FUNCTIONS, *GREEK, "pi", "infinity"])
PLAIN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=[A-Za-z])'+", lambda match: f"_{{{'p' * len(match[0])}}}"),
        (r"\*\*", "^"),
        (r"!=", r"\\neq "),
        (r":=", "="),
        (r"<=", r"\\leq "),
        (r">=", r"\\geq "),
        (r"\*", r"\\cdot "),
        (r"(?<!\d)(\d{1,3}(?:,\d{3})+)(?![\d,])", lambda match: match[0].replace(",", "")),
        (r"(\d(?:\.\d+)?)[eE]([-+]?\d{1,4})(?![\dA-Za-z])", r"\1\\cdot 10^{\2}"),
        (r"\babs\s?\(([^()]*)\)", r"|\1|"),
        (rf"(?<![\\A-Za-z])({NAMES})(?![A-Za-z])", lambda match: command(match[1])),
        (r"(?<![\\A-Za-z])in(?![A-Za-z])", r"\\in "),
        (r"\\langle(.*)\\rangle", r"(\1)"),
        (r"\\mid(?![A-Za-z])", "|"),
        # {x | x > 3} is x > 3
        (
            r"^\\\{\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?[|:]([^|:]*[<>=q][^|:]*)\\\}$",
            r"\2",
        ),
        (r"(?<![,<>=\w])\s*,?\s*[A-Za-z]\s*\\in\s*\\mathbb\{R\}$", ""),
    )
]
BRACKETED = re.compile(r"(\^|\\sqrt)\s{0,3}\(")
OR = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])|\\vee|\\lor")


def command(name: str) -> str:
    """Return the LaTeX command of a function, constant or Greek letter."""
    return {"infinity": r"\infty "}.get(name, rf"\{ARC.get(name, name)} ")


def latex(text: str) -> str:
    """Turn algebra as it is typed into LaTeX; LaTeX stays as it is."""
    for pattern, replacement in PLAIN:
        text = pattern.sub(replacement, text)
    position = 0
    while match := BRACKETED.search(text, position):
        depth, position = 1, match.end()
        while depth and position < len(text):
            depth += (text[position] == "(") - (text[position] == ")")
            position += 1
        if depth == 0:
            inner = text[match.end() : position - 1]
            text = f"{text[: match.start()]}{match[1]}{{{inner}}}{text[position:]}"
        position = match.end()
    return text.replace("°", "")


@cache
def library() -> Any:
    """Load what is used of Math-Verify."""
    from latex2sympy2_extended.latex2sympy2 import (
        ConversionConfig,
        NormalizationConfig,
        latex2sympy,
        normalize_latex,
    )
    from math_verify.grader import should_treat_as_complex, verify

    dressing = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )

    def normalized(text: str) -> str:
        return str(normalize_latex(latex(text), dressing))

    def parsed(text: str, real: bool) -> Any:
        return latex2sympy(
            text,
            is_real=real,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )

    def equal(left: Any, right: Any) -> bool:
        return bool(verify([right], [left], timeout_seconds=None, allow_set_relation_comp=True))

    return normalized, parsed, should_treat_as_complex, equal


def compare(prediction: str, gold: str) -> str:
    """Judge whether two formulas mean the same."""
    normalized, _, has_imaginary, _ = library()
    left, right = normalized(prediction), normalized(gold)
    real = not (has_imaginary(left) or has_imaginary(right))
    try:
        found = [read(prediction, real), read(gold, real)]
    except Exception:
        if re.sub(r"\s", "", left) == re.sub(r"\s", "", right):
            return EQUAL
        raise
    return decide(*found)


@lru_cache(maxsize=256)
def read(text: str, real: bool) -> Any:
    """Return what sympy has of a formula; the gold of many samples is read once."""
    normalized, parsed, _, _ = library()
    return exact(parsed(normalized(text), real), bool(OR.search(text)), real)


def exact(found: Any, either: bool, real: bool) -> Any:
    """Make decimals fractions, ``i`` the imaginary unit, odd roots real, and work out sums."""
    import sympy

    if isinstance(found, sympy.Expr) and not isinstance(found, sympy.MatrixBase):
        found = found.doit()
    if isinstance(found, sympy.MatrixBase):
        return sympy.ImmutableMatrix(found.applyfunc(lambda part: exact(part, either, real)))
    if not isinstance(found, sympy.Basic):
        return found
    known = {number: sympy.Rational(str(number)) for number in found.atoms(sympy.Float)}
    if not real:
        known |= {name: sympy.I for name in found.free_symbols if name.name == "i"}
    roots = [
        power
        for power in found.atoms(sympy.Pow)
        if power.base.is_number and power.base.is_negative and power.exp.is_Rational
        if power.exp.q % 2
    ]
    known |= {p: sympy.real_root(p.base, p.exp.q) ** p.exp.p for p in roots if p.exp.q > 1}
    found = found.xreplace(known) if known else found
    if isinstance(found, sympy.FiniteSet) and either:
        if all(is_inequality(part) for part in found.args):
            return sympy.Union(*(part.as_set() for part in found.args))
    return found


def is_relation(found: Any) -> bool:
    """Tell whether sympy has an equation, an inequality or a chain of them."""
    import sympy

    return isinstance(found, (sympy.core.relational.Relational, sympy.And))


def is_inequality(found: Any) -> bool:
    """Tell whether sympy has one inequality in one variable, or a chain of them."""
    import sympy

    parts = found.args if isinstance(found, sympy.And) else (found,)
    kinds = (sympy.StrictLessThan, sympy.LessThan, sympy.StrictGreaterThan, sympy.GreaterThan)
    return all(isinstance(part, kinds) for part in parts) and len(found.free_symbols) == 1


def decide(left: Any, right: Any) -> str:
    """Compare what sympy has of two formulas: numbers that differ first, then Math-Verify."""
    import sympy

    left, right = beside(left, right), beside(right, left)
    if left is None or right is None:
        return DIFFERENT
    if undefined(left) or undefined(right):
        return UNDECIDED
    if is_relation(left) and is_relation(right):
        return decide_relations(left, right)
    if is_relation(left) and is_inequality(left) and isinstance(right, sympy.Set):
        left = left.as_set()
    if is_relation(right) and is_inequality(right) and isinstance(left, sympy.Set):
        right = right.as_set()
    if differ(left, right):
        return DIFFERENT
    return EQUAL if library()[3](left, right) else UNDECIDED


def beside(found: Any, other: Any) -> Any:
    """Take the last side of ``x = 5`` beside an answer that is no relation.

    ``f(x) = x^2`` answers ``x^2`` and ``3 + 4 = 7`` answers 7; ``None`` for ``x^2 - 1 = 0``,
    which does not answer 0. ``x ∈ S`` answers S beside anything.
    """
    import sympy
    from sympy.core.function import AppliedUndef

    chain = found.args if isinstance(found, sympy.And) else (found,)
    if not all(isinstance(part, sympy.Eq) for part in chain):
        return found
    parts = sorted(chain, key=lambda part: str(part)) if len(chain) > 1 else chain
    first = getattr(found, "_unsorted_args", parts)[0].lhs if len(chain) > 1 else parts[0].lhs
    last = getattr(found, "_unsorted_args", parts)[-1].rhs if len(chain) > 1 else parts[0].rhs
    if isinstance(last, sympy.Set) and first.is_Symbol:
        return last
    if is_relation(other):
        return sympy.Eq(first, last, evaluate=False) if len(chain) > 1 else found
    product = first.is_Mul and all(part.is_Symbol or part.is_number for part in first.args)
    if first.is_Symbol or first.is_number or isinstance(first, AppliedUndef) or product:
        return last
    return None if isinstance(other, sympy.Expr) else found


def undefined(found: Any) -> bool:
    """Tell whether a formula has a part without a value, such as ``1/0`` or ``∞ - ∞``."""
    import sympy

    if isinstance(found, sympy.Set) or not isinstance(found, sympy.Basic):
        return False
    if found in (sympy.oo, -sympy.oo):
        return False
    return bool(found.has(sympy.nan, sympy.zoo)) or (
        isinstance(found, sympy.Expr) and bool(found.has(sympy.oo))
    )


def decide_relations(left: Any, right: Any) -> str:
    """Compare equations by their ratio, inequalities in one variable by what fulfils them."""
    import sympy

    if {type(left), type(right)} == {sympy.Ne, sympy.Eq}:
        return DIFFERENT
    if type(left) is type(right) is sympy.Ne:
        left, right = (sympy.Eq(*side.args, evaluate=False) for side in (left, right))
    if isinstance(left, sympy.Eq) and isinstance(right, sympy.Eq):
        above, below = left.lhs - left.rhs, right.lhs - right.rhs
        if not above.free_symbols or not below.free_symbols:
            # "1 = 1" and "2 = 2" hold equally and say no same
            return EQUAL if left == right else UNDECIDED
        ratios = values(above / below, above.free_symbols | below.free_symbols)
        if ratios and all(
            abs(r - ratios[0]) < abs(ratios[0]) * sympy.Float(10) ** -20 for r in ratios
        ):
            return EQUAL if ratios[0] else UNDECIDED
        if not library()[3](left, right):
            return DIFFERENT
        return EQUAL if sympy.solve(left, dict=True) else UNDECIDED
    if is_inequality(left) and is_inequality(right):
        if left.free_symbols != right.free_symbols:
            return DIFFERENT
        sets = [side.as_set() for side in (left, right)]
        return EQUAL if sets[0] == sets[1] else DIFFERENT
    return EQUAL if library()[3](left, right) else UNDECIDED


def differ(left: Any, right: Any) -> bool:
    """Tell whether two formulas are shown to differ: by a number, an element or an end."""
    import sympy

    left, right = beside(left, right), beside(right, left)
    if is_relation(left) and is_relation(right):
        return decide_relations(left, right) == DIFFERENT
    containers = (sympy.Set, sympy.Tuple, sympy.MatrixBase)
    sides = [left, right]
    if not any(isinstance(side, containers) for side in sides):
        scalars = all(isinstance(side, sympy.Expr) for side in sides)
        return scalars and expressions_differ(left, right)
    for index, side in enumerate(sides):
        if isinstance(side, sympy.Expr) and not isinstance(side, sympy.MatrixBase):
            sides[index] = sympy.FiniteSet(side)
    finite = (sympy.FiniteSet, sympy.Tuple)
    for index, other in ((0, sides[1]), (1, sides[0])):  # (1, 2) is a point, too
        side = sides[index]
        if isinstance(side, sympy.Interval) and isinstance(other, finite):
            if side.left_open and side.right_open:
                sides[index] = sympy.Tuple(side.start, side.end)
    a, b = sides
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape != b.shape or any(map(differ, a, b))
    if isinstance(a, sympy.Interval) and isinstance(b, sympy.Interval):
        closed = (a.left_open, a.right_open) != (b.left_open, b.right_open)
        return closed or differ(a.start, b.start) or differ(a.end, b.end)
    if isinstance(a, sympy.Tuple) and isinstance(b, sympy.Tuple):
        return len(a) != len(b) or any(map(differ, a, b))
    if isinstance(a, finite) and isinstance(b, finite):
        if len(a) > MAX_ELEMENTS or len(b) > MAX_ELEMENTS:
            return False
        return any(
            all(differ(element, other) for other in there)
            for here, there in ((a, b), (b, a))
            for element in here
        )
    if isinstance(a, sympy.Set) and isinstance(b, sympy.Set):
        return a.is_subset(b) is False or b.is_subset(a) is False
    return False


def expressions_differ(left: Any, right: Any) -> bool:
    """Tell whether numbers put in for the variables show a difference."""
    import sympy

    infinities = (sympy.oo, -sympy.oo)
    if left in infinities or right in infinities:
        return bool(left != right and left.is_number and right.is_number)
    symbols = left.free_symbols | right.free_symbols
    sizes = values(sympy.Abs(left) + sympy.Abs(right) + sympy.Rational(1, 10**40), symbols)
    for value, size in zip(values(left - right, symbols), sizes, strict=False):
        if abs(value) > abs(size) * sympy.Float(10) ** (10 - DIGITS):
            return True
    return False


def values(expression: Any, symbols: Any) -> list[Any]:
    """Work out an expression at up to four points, to 30 digits; none if one has no value."""
    import sympy

    names = sorted(symbols, key=str)
    found = []
    for index, (numerator, denominator) in enumerate(POINTS if names else POINTS[:1]):
        point = {
            symbol: sympy.Rational(numerator + 2 * place * (-1) ** index, denominator + place)
            for place, symbol in enumerate(names)
        }
        value = expression.subs(point).evalf(DIGITS, maxn=200)
        if not (value.is_number and value.is_finite):
            return []
        found.append(value)
    return found
