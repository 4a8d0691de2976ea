r"""Two formulas compared by Math-Verify; imported in the worker only.

Math-Verify reads LaTeX and shows that formulas are equal. Ours is what it lacks: algebra as it is
typed (``sqrt(x)``, ``x^(2n)``), the imaginary unit, decimals as exact numbers, real odd roots,
inequalities joined by "or", equations without a solution, and showing that formulas differ:
numbers put in for the variables do so.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy2 as latex2sympy
from math_verify.grader import should_treat_as_complex, verify
from sympy.core.relational import Relational

from vps.verify.answer import FUNCTIONS, GREEK

EQUAL, DIFFERENT, UNDECIDED = "equal", "different", "undecided"

# Values put in for variables, none of them special: fractions of both signs, small and large.
POINTS = ((7, 11), (-13, 17), (23, 5), (-19, 3))
DIGITS = 30
TINY = sympy.Float(10) ** (10 - DIGITS)
MAX_ELEMENTS = 16
FINITE = (sympy.FiniteSet, sympy.Tuple)
INFINITIES = (sympy.oo, -sympy.oo)
INEQUALITIES = (
    sympy.StrictLessThan,
    sympy.LessThan,
    sympy.StrictGreaterThan,
    sympy.GreaterThan,
)
NORMALIZATION = latex2sympy.NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
)
CONVERSION = latex2sympy.ConversionConfig(lowercase_symbols=False)

NAMES = "|".join([*FUNCTIONS, *GREEK, "pi", "infinity", "in"])
RENAMED = {"infinity": "infty", "asin": "arcsin", "acos": "arccos", "atan": "arctan"}
TYPED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=[A-Za-z])'+", lambda primes: f"_{{{'p' * len(primes[0])}}}"),
        (r"\*\*", "^"),
        (r"!=", r"\\neq "),
        (r":=", "="),
        (r"<=", r"\\leq "),
        (r">=", r"\\geq "),
        (r"\*", r"\\cdot "),
        (r"°", ""),
        (r"\\varnothing", r"\\emptyset"),
        (r"\\sqrt\s+(\d+)", r"\\sqrt{\1}"),
        (r"(?<!\d)(\d{1,3}(?:,\d{3})+)(?![\d,])", lambda number: number[0].replace(",", "")),
        (r"(\d(?:\.\d+)?)[eE]([-+]?\d{1,4})(?![\dA-Za-z])", r"\1\\cdot 10^{\2}"),
        (r"\babs\s?\(([^()]*)\)", r"|\1|"),
        (
            rf"(?<![\\A-Za-z])({NAMES})(?![A-Za-z])",
            lambda name: rf"\{RENAMED.get(name[1], name[1])} ",
        ),
        (r"\\langle(.*)\\rangle", r"(\1)"),
        (r"\\begin\{array\}\{[clr|]+\}", r"\\begin{matrix}"),
        (r"\\end\{array\}", r"\\end{matrix}"),
        (r"\\begin\{cases\}(.*)\\end\{cases\}", lambda cases: cases[1].replace(r"\\", ",")),
        # (x, y) = (1, 2) is the point
        (r"^\(\s?(?:x,\s?y(?:,\s?z)?|a,\s?b(?:,\s?c)?|m,\s?n|p,\s?q)\s?\)\s?=\s?(?=\()", ""),
        # {x | x > 3} is x > 3
        (
            r"^\\\{\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:[|:]|\\mid)([^|:]*[<>=q][^|:]*)\\\}$",
            r"\1",
        ),
    )
]
BRACKETED = re.compile(r"(\^|\\sqrt)\s{0,3}\(")
OR = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])|\\vee|\\lor")


def latex(text: str) -> str:
    """Turn algebra as it is typed into LaTeX as Math-Verify likes it."""
    for pattern, replacement in TYPED:
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
    return str(latex2sympy.normalize_latex(text, NORMALIZATION))


def compare(prediction: str, gold: str) -> str:
    """Judge whether two formulas mean the same: equal, different or undecided."""
    left, right = latex(prediction), latex(gold)
    real = not (should_treat_as_complex(left) or should_treat_as_complex(right))
    try:
        return decide(read(prediction, real), read(gold, real))
    except Exception:
        if re.sub(r"\s", "", left) == re.sub(r"\s", "", right):
            return EQUAL
        raise


@lru_cache(maxsize=256)
def read(text: str, real: bool) -> Any:
    """Return what sympy has of a formula; the gold of many samples is read once."""
    found = latex2sympy.latex2sympy(
        latex(text),
        is_real=real,
        convert_degrees=False,
        normalization_config=None,
        conversion_config=CONVERSION,
    )
    found = exact(found, real)
    if isinstance(found, sympy.FiniteSet) and OR.search(text):
        if all(map(is_inequality, found.args)):
            return sympy.Union(*(part.as_set() for part in found.args))
    return found


def exact(found: Any, real: bool) -> Any:
    """Make decimals fractions, ``i`` the imaginary unit and odd roots real; work out sums."""
    if isinstance(found, sympy.MatrixBase):
        return sympy.ImmutableMatrix(found.applyfunc(lambda part: exact(part, real)))
    if not isinstance(found, sympy.Basic):
        return found
    if isinstance(found, sympy.Expr):
        found = found.doit()
    known = {number: sympy.Rational(str(number)) for number in found.atoms(sympy.Float)}
    if not real:
        known |= {name: sympy.I for name in found.free_symbols if name.name == "i"}
    for power in found.atoms(sympy.Pow):
        degree = power.exp.q if power.exp.is_Rational else 0
        if degree % 2 and degree > 1 and power.base.is_number and power.base.is_negative:
            known[power] = sympy.real_root(power.base, degree) ** power.exp.p
    return found.xreplace(known)


def is_relation(found: Any) -> bool:
    """Tell whether sympy has an equation, an inequality or a chain of them."""
    return isinstance(found, (Relational, sympy.And))


def is_inequality(found: Any) -> bool:
    """Tell whether sympy has one inequality in one variable, or a chain of them."""
    parts = found.args if isinstance(found, sympy.And) else (found,)
    return all(isinstance(part, INEQUALITIES) for part in parts) and len(found.free_symbols) == 1


def is_equal(left: Any, right: Any) -> bool:
    """Tell whether Math-Verify shows that two formulas are equal."""
    return bool(verify([right], [left], timeout_seconds=None, allow_set_relation_comp=True))


def beside(found: Any, other: Any) -> Any:
    """Take the last side of ``x = 5`` beside an answer that is no relation.

    ``f(x) = x^2`` answers ``x^2`` and ``\\cos x = 3/5`` answers 3/5; ``None`` for ``x^2 - 1 = 0``,
    which does not answer 0. ``x ∈ S`` answers S beside anything.
    """
    parts = (
        getattr(found, "_unsorted_args", found.args) if isinstance(found, sympy.And) else (found,)
    )
    if not all(isinstance(part, sympy.Eq) for part in parts):
        return found.as_set() if is_inequality(found) and isinstance(other, sympy.Set) else found
    first, last = parts[0].lhs, parts[-1].rhs
    if isinstance(last, sympy.Set) and first.is_Symbol:
        return last
    if is_relation(other):
        return found if len(parts) == 1 else sympy.Eq(first, last, evaluate=False)
    if not first.is_Add or all(part.is_Symbol for part in first.args):
        return last
    return None if isinstance(other, sympy.Expr) else found


def in_order(found: Any, other: Any) -> tuple[Any, Any]:
    """Make points of ``x = 1, y = 2`` and an answer without names: values in the order of names."""
    names = {part.lhs: part.rhs for part in assignments(found)}
    bare = isinstance(other, (*FINITE, sympy.Interval)) and not assignments(other)
    if len(names) < 2 or not bare:
        return found, other
    listed = getattr(other, "_unsorted_args", other.args)
    if isinstance(other, sympy.Interval):
        listed = (other.start, other.end)
    return sympy.Tuple(*(names[name] for name in sorted(names, key=str))), sympy.Tuple(*listed)


def assignments(found: Any) -> list[Any]:
    """List the equations of a set that has nothing but equations that name a variable."""
    parts = list(found.args) if isinstance(found, sympy.FiniteSet) else []
    named = all(isinstance(part, sympy.Eq) and part.lhs.is_Symbol for part in parts)
    return parts if named else []


def undefined(found: Any) -> bool:
    """Tell whether a formula has a part without a value, such as ``1/0`` or ``∞ - ∞``."""
    if isinstance(found, sympy.Set) or not isinstance(found, sympy.Basic) or found in INFINITIES:
        return False
    return bool(found.has(sympy.nan, sympy.zoo, *INFINITIES))


def decide(left: Any, right: Any) -> str:
    """Compare what sympy has of two formulas: numbers that differ first, then Math-Verify."""
    left, right = beside(left, right), beside(right, left)
    left, right = in_order(left, right)
    right, left = in_order(right, left)
    if left is None or right is None:
        return DIFFERENT
    if undefined(left) or undefined(right):
        return UNDECIDED
    if is_relation(left) and is_relation(right):
        return decide_relations(left, right)
    if differ(left, right):
        return DIFFERENT
    return EQUAL if is_equal(left, right) else UNDECIDED


def decide_relations(left: Any, right: Any) -> str:
    """Compare equations by their ratio, inequalities in one variable by what fulfils them."""
    kinds = {type(left), type(right)}
    if kinds == {sympy.Ne, sympy.Eq}:
        return DIFFERENT
    if is_inequality(left) and is_inequality(right):
        same = left.free_symbols == right.free_symbols and left.as_set() == right.as_set()
        return EQUAL if same else DIFFERENT
    if kinds not in ({sympy.Eq}, {sympy.Ne}):
        return EQUAL if is_equal(left, right) else UNDECIDED
    above, below = left.lhs - left.rhs, right.lhs - right.rhs
    if not above.free_symbols or not below.free_symbols:
        # "1 = 1" and "2 = 2" hold equally and say no same
        return EQUAL if left == right else UNDECIDED
    ratios = values(above / below, above.free_symbols | below.free_symbols)
    if ratios and all(abs(ratio - ratios[0]) < abs(ratios[0]) * TINY for ratio in ratios):
        return EQUAL
    if not is_equal(left, right):
        return DIFFERENT
    return EQUAL if sympy.solve(left, dict=True) else UNDECIDED


def differ(left: Any, right: Any) -> bool:
    """Tell whether two formulas are shown to differ: by a number, an element or an end."""
    a, b = beside(left, right), beside(right, left)
    if is_relation(a) and is_relation(b):
        return decide_relations(a, b) == DIFFERENT
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape != b.shape or any(map(differ, a, b))
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return expressions_differ(a, b)
    a, b = container(a, b), container(b, a)
    if isinstance(a, sympy.Tuple) and isinstance(b, sympy.Tuple):
        return len(a) != len(b) or any(map(differ, a, b))
    if isinstance(a, FINITE) and isinstance(b, FINITE):
        if max(len(a), len(b)) > MAX_ELEMENTS:
            return False
        sides = ((a, b), (b, a))
        return any(all(differ(x, y) for y in there) for here, there in sides for x in here)
    if isinstance(a, sympy.Interval) and isinstance(b, sympy.Interval):
        if (a.left_open, a.right_open) == (b.left_open, b.right_open):
            return differ(a.start, b.start) or differ(a.end, b.end)
    if isinstance(a, sympy.Set) and isinstance(b, sympy.Set):
        return a.is_subset(b) is False or b.is_subset(a) is False
    return False


def container(side: Any, other: Any) -> Any:
    """Make a number a set of one, and ``(1, 2)`` a point where the other side lists numbers."""
    if isinstance(side, sympy.Interval) and isinstance(other, FINITE):
        return sympy.Tuple(side.start, side.end) if side.left_open and side.right_open else side
    return sympy.FiniteSet(side) if isinstance(side, sympy.Expr) else side


def expressions_differ(left: Any, right: Any) -> bool:
    """Tell whether numbers put in for the variables show a difference."""
    if not {left, right}.isdisjoint(INFINITIES):
        return bool(left != right and left.is_number and right.is_number)
    symbols = left.free_symbols | right.free_symbols
    sizes = values(sympy.Abs(left) + sympy.Abs(right) + sympy.Rational(1, 10**40), symbols)
    differences = zip(values(left - right, symbols), sizes, strict=False)
    return any(abs(value) > abs(size) * TINY for value, size in differences)


def values(expression: Any, symbols: Any) -> list[Any]:
    """Work out an expression at up to four points, to 30 digits; none if one has no value."""
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
