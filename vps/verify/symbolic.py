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
from latex2sympy2_extended import is_expr_of_only_symbols
from latex2sympy2_extended import latex2sympy2 as latex2sympy
from math_verify.grader import should_treat_as_complex, verify
from sympy.core.relational import Relational

from vps.verify.answer import FUNCTIONS, GREEK

EQUAL, DIFFERENT, UNDECIDED = "correct", "wrong", "undecided"

# Values put in for variables, none of them special: fractions of both signs, small and large.
POINTS = ((7, 11), (-13, 17), (23, 5), (-19, 3))
DIGITS = 30
TINY = sympy.Float(10) ** (10 - DIGITS)
MAX_ELEMENTS = 16
FINITE = (sympy.FiniteSet, sympy.Tuple)
INFINITIES = (sympy.oo, -sympy.oo)
NORMALIZATION = latex2sympy.NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
)
CONVERSION = latex2sympy.ConversionConfig(lowercase_symbols=False)

NAMES = "|".join([*FUNCTIONS, *GREEK, "pi", "infinity", "in"])
RENAMED = {"infinity": "infty", "asin": "arcsin", "acos": "arccos", "atan": "arctan"}
CURRENT = re.compile(r"I\s?[_^A-Z]|[A-Z]I")
TYPED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=[A-Za-z}])'+", lambda primes: f"_{{{'p' * len(primes[0])}}}"),
        (r"\*\*", "^"),
        (r":=", "="),
        # Another letter for the I of I_2, I^2 and IR, which loses its index and power
        (r"(?<![a-z\\])I(?![a-z])", lambda i: r"\Upsilon " if CURRENT.search(i.string) else "I"),
        (r"°", lambda sign: r"^{\circ}" if re.search(r"sin|cos|tan", sign.string) else ""),
        (r"\\lg(?![A-Za-z])", r"\\log_{10}"),
        (r"\\[lr]brace(?![A-Za-z])", lambda brace: r"\{" if brace[0][1] == "l" else r"\}"),
        (r"\}\s*(?=\\d?binom)", r"}\\cdot "),
        (r"(\\mathbb\s?\{?[RZNQC]\}?)\s*-", r"\1\\setminus "),
        (r"\\varnothing", r"\\emptyset"),
        (r"\\sqrt\s+(\d+)", r"\\sqrt{\1}"),
        (r"(?<!\d)(\d{1,3}(?:,\d{3})+)(?![\d,])", lambda number: number[0].replace(",", "")),
        (r"\babs\s?\(([^()]*)\)", r"|\1|"),
        (
            rf"(?<![\\A-Za-z])({NAMES})(?![A-Za-z])",
            lambda name: rf"\{RENAMED.get(name[1], name[1])} ",
        ),
        (r"\\langle(.*)\\rangle", r"(\1)"),
        (r"\\begin\{array\}\{[clr|]+\}", r"\\begin{matrix}"),
        (r"\\end\{array\}", r"\\end{matrix}"),
        # {x | x > 3} is x > 3
        (
            r"^\\\{\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:[|:]|\\mid)([^|:]*[<>=q][^|:]*)\\\}$",
            r"\1",
        ),
    )
]
# Brackets of up to three levels behind a power or a root.
NESTED = r"[^()]*"
for _ in range(3):
    NESTED = rf"[^()]*(?:\({NESTED}\)[^()]*)*"
BRACKETED = re.compile(rf"(\^|\\sqrt)\s{{0,3}}\(({NESTED})\)")
IMAGINARY = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")
DOTS = re.compile(r"\\[lc]?dots|\.{3}|…")
OR = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])|\\vee|\\lor")


def latex(text: str) -> str:
    """Turn algebra as it is typed into LaTeX as Math-Verify likes it."""
    for pattern, replacement in TYPED:
        text = pattern.sub(replacement, text)
    for _ in range(3):
        text = BRACKETED.sub(r"\1{\2}", text)
    return str(latex2sympy.normalize_latex(text, NORMALIZATION))


def compare(prediction: str, gold: str) -> str:
    """Judge whether two formulas mean the same: equal, different or undecided."""
    if DOTS.search(prediction + gold):  # what goes on like that is only known to go on
        same = re.sub(r"\s", "", prediction) == re.sub(r"\s", "", gold)
        return EQUAL if same else UNDECIDED
    left, right = latex(prediction), latex(gold)
    imaginary = (should_treat_as_complex(side) or IMAGINARY.search(side) for side in (left, right))
    real = not any(imaginary)
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
        convert_degrees=True,
        normalization_config=None,
        conversion_config=CONVERSION,
    )
    found = exact(found, real)
    if isinstance(found, sympy.FiniteSet) and OR.search(text):
        if all(map(is_inequality, found.args)) and len(found.free_symbols) == 1:
            return sympy.Union(*(part.as_set() for part in found.args))
    return found


def exact(found: Any, real: bool) -> Any:
    """Make decimals fractions, ``i`` the imaginary unit and odd roots real; work out sums."""
    if isinstance(found, sympy.MatrixBase):
        return sympy.ImmutableMatrix(found.applyfunc(lambda part: exact(part, real)))
    if not isinstance(found, sympy.Basic):
        return found
    if isinstance(found, (sympy.Expr, sympy.Intersection)):
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
    signs = {getattr(part, "rel_op", "") for part in listed(found)}
    return is_relation(found) and signs <= {"<", "<=", ">", ">="} and len(found.free_symbols) == 1


def is_equal(left: Any, right: Any) -> str:
    """Judge formulas that no number tells apart: Math-Verify shows that they are equal, or not."""
    shown = verify([right], [left], timeout_seconds=None, allow_set_relation_comp=True)
    return EQUAL if shown else UNDECIDED


def beside(found: Any, other: Any) -> Any:
    """Take of a formula what answers the same question as the other one.

    The last side of ``x = 5`` beside an answer that is no relation: ``f(x) = x^2`` answers
    ``x^2`` and ``\\cos x = 3/5`` answers 3/5, but ``x^2 - 1 = 0`` does not answer 0 (``None``).
    ``x ∈ S`` answers S beside anything. ``(1, 2)`` is a point beside a list, and so is
    ``x = 1, y = 2``, in the order of the names, beside values without names.
    """
    if isinstance(found, sympy.Interval) and isinstance(other, FINITE):
        return sympy.Tuple(found.start, found.end) if found.is_open else found
    if isinstance(found, sympy.FiniteSet):
        names = {str(part.lhs): part.rhs for part in found.args if is_assignment(part)}
        bare = isinstance(other, (*FINITE, sympy.Interval)) and not any(
            map(is_assignment, other.args)
        )
        if 1 < len(names) == len(found) and bare:
            return sympy.Tuple(*(names[name] for name in sorted(names)))
    if isinstance(found, sympy.Expr) and isinstance(other, (sympy.Set, sympy.Tuple)):
        return sympy.FiniteSet(found)
    if isinstance(other, sympy.Set) and is_inequality(found):
        return found.as_set()
    parts = listed(found)
    if isinstance(found, FINITE) or not all(isinstance(part, sympy.Eq) for part in parts):
        return found
    first, last = parts[0].lhs, parts[-1].rhs
    if first.is_number and last.is_Symbol:
        first, last = last, first
    if isinstance(last, sympy.Set) and first.is_Symbol:
        return beside(last, other)
    if is_relation(other):
        return found if len(parts) == 1 else sympy.Eq(first, last, evaluate=False)
    if is_expr_of_only_symbols(first) or isinstance(first, (sympy.Function, sympy.Derivative)):
        return beside(last, other)
    return None if isinstance(other, sympy.Expr) else found


def listed(found: Any) -> tuple[Any, ...]:
    """Return the links of a chain or the elements of a list as written, or the one formula."""
    several = isinstance(found, (sympy.And, *FINITE))
    return tuple(getattr(found, "_unsorted_args", found.args)) if several else (found,)


def is_assignment(found: Any) -> bool:
    """Tell whether sympy has an equation that names a variable."""
    return isinstance(found, sympy.Eq) and bool(found.lhs.is_Symbol)


def decide(left: Any, right: Any) -> str:
    """Compare what sympy has of two formulas, part by part where they have parts."""
    for _ in range(2):
        left, right = beside(left, right), beside(right, left)
    if left is None or right is None:
        return DIFFERENT
    if undefined(left) or undefined(right):
        return UNDECIDED
    if is_relation(left) and is_relation(right):
        return decide_relations(left, right)
    if isinstance(left, sympy.MatrixBase) and isinstance(right, sympy.MatrixBase):
        return in_order(left, right) if left.shape == right.shape else DIFFERENT
    if isinstance(left, FINITE) and isinstance(right, FINITE):
        if isinstance(left, sympy.Tuple) or isinstance(right, sympy.Tuple):
            return in_order(listed(left), listed(right))
        return in_any_order(left.args, right.args)
    if isinstance(left, sympy.Interval) and isinstance(right, sympy.Interval):
        if (left.left_open, left.right_open) == (right.left_open, right.right_open):
            return in_order((left.start, left.end), (right.start, right.end))
    if isinstance(left, sympy.Set) and isinstance(right, sympy.Set):
        if left.is_subset(right) is False or right.is_subset(left) is False:
            return DIFFERENT
    elif isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr) and differ(left, right):
        return DIFFERENT
    return is_equal(left, right)


def in_order(left: Any, right: Any) -> str:
    """Compare element by element."""
    if len(left) != len(right):
        return DIFFERENT
    found = {decide(*pair) for pair in zip(left, right, strict=True)}
    return DIFFERENT if DIFFERENT in found else UNDECIDED if UNDECIDED in found else EQUAL


def in_any_order(left: Any, right: Any) -> str:
    """Compare two sets: each element must have its equal, and one that has none differs."""
    if max(len(left), len(right)) > MAX_ELEMENTS:
        return UNDECIDED
    rows = [[decide(a, b) for b in right] for a in left]
    found = [set(line) for lines in (rows, zip(*rows, strict=True)) for line in lines]
    if not rows or not right or any(line == {DIFFERENT} for line in found):
        return EQUAL if len(left) == len(right) == 0 else DIFFERENT
    return EQUAL if all(EQUAL in line for line in found) else UNDECIDED


def undefined(found: Any) -> bool:
    """Tell whether a formula has a part without a value, such as ``1/0`` or ``∞ - ∞``."""
    if isinstance(found, sympy.Set) or not isinstance(found, sympy.Basic) or found in INFINITIES:
        return False
    return bool(found.has(sympy.nan, sympy.zoo, *INFINITIES))


def decide_relations(left: Any, right: Any) -> str:
    """Compare equations by their ratio, inequalities in one variable by what fulfils them."""
    kinds = {type(left), type(right)}
    if kinds == {sympy.Ne, sympy.Eq}:
        return DIFFERENT
    if is_inequality(left) and is_inequality(right):
        same = left.free_symbols == right.free_symbols and left.as_set() == right.as_set()
        return EQUAL if same else DIFFERENT
    if kinds not in ({sympy.Eq}, {sympy.Ne}):
        turned = [part.reversed for part in reversed(listed(left))]
        return EQUAL if tuple(turned) == listed(right) else is_equal(left, right)
    above, below = left.lhs - left.rhs, right.lhs - right.rhs
    if not above.free_symbols or not below.free_symbols:
        # "1 = 1" and "2 = 2" hold equally and say no same
        return EQUAL if left == right else UNDECIDED
    ratios = values(above / below, above.free_symbols | below.free_symbols)
    if ratios and all(abs(ratio - ratios[0]) < abs(ratios[0]) * TINY for ratio in ratios):
        return EQUAL
    if is_equal(left, right) != EQUAL:
        return DIFFERENT
    return EQUAL if sympy.solve(left, dict=True) else UNDECIDED


def differ(left: Any, right: Any) -> bool:
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
