"""Comparison of two expressions with sympy; runs in the worker only, on parsed nodes, no text.

An answer is ``"equal"``, ``"different"`` or ``"undecided"``. Different is said only where numbers
put in for the variables show it; equal only where sympy simplifies the difference to 0.
"""

from __future__ import annotations

from typing import Any

EQUAL, DIFFERENT, UNDECIDED = "equal", "different", "undecided"

# Values put in for variables, none of them special: fractions of both signs, small and large.
POINTS = ((7, 11), (-13, 17), (23, 5), (-19, 3))
DIGITS = 30
RELATIONS = ("equals", "less", "at_most")

FUNCTIONS = {
    **{name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan")},
    **{name: name for name in ("sinh", "cosh", "tanh", "exp", "log", "sqrt")},
    "abs": "Abs",
}


def build(node: list[Any]) -> Any:
    """The sympy object of a node as JSON carried it; containers become tuples.

    Raises:
        ValueError: an unknown kind of node.
    """
    import sympy

    kind, *rest = node
    if kind == "number":
        return sympy.Rational(*map(int, rest[0].split("/")))
    if kind == "symbol":
        return sympy.Symbol(rest[0])
    if kind == "constant":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "infinity": sympy.oo}[rest[0]]
    if kind == "latex":
        return from_latex(rest[0])
    if kind == "call":
        return getattr(sympy, FUNCTIONS[rest[0]])(build(rest[1]))
    operands = [build(operand) for operand in rest]
    match kind:
        case "add":
            return operands[0] + operands[1]
        case "subtract":
            return operands[0] - operands[1]
        case "multiply":
            return operands[0] * operands[1]
        case "divide":
            return operands[0] / operands[1]
        case "power":
            return operands[0] ** operands[1]
        case "factorial":
            return sympy.factorial(operands[0])
        case "tuple" | "equals" | "less" | "at_most":
            return (kind, *operands)
    raise ValueError(f"unknown kind of node {str(kind)[:20]!r}")


def from_latex(text: str) -> Any:
    """What ``latex2sympy2_extended`` reads; equations and tuples as :func:`build` makes them."""
    import sympy
    from latex2sympy2_extended import latex2sympy

    found = latex2sympy(text)
    if isinstance(found, sympy.Eq):
        return ("equals", *found.args)
    if isinstance(found, (sympy.Tuple, tuple)):
        return ("tuple", *found)
    if isinstance(found, sympy.MatrixBase):
        return ("matrix", *found.shape, *found)
    if isinstance(found, sympy.Basic) and found.has(sympy.Integral, sympy.Sum, sympy.Limit):
        return found.doit()
    return found


def compare(left: list[Any], right: list[Any]) -> str:
    """Whether two nodes mean the same."""
    return decide(build(left), build(right))


def decide(left: Any, right: Any) -> str:
    """As :func:`compare`, for what :func:`build` makes."""
    import sympy

    if isinstance(left, tuple) and isinstance(right, tuple):
        return decide_containers(left, right)
    if isinstance(left, tuple) or isinstance(right, tuple):
        return decide_side(left, right)
    if isinstance(left, sympy.Set) or isinstance(right, sympy.Set):
        return decide_sets(left, right)
    if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
        return decide_expressions(left, right)
    return EQUAL if left == right else UNDECIDED


def decide_containers(left: tuple[Any, ...], right: tuple[Any, ...]) -> str:
    """Tuples and matrices by their elements, equations and inequalities as a whole."""
    if left[0] != right[0]:
        return DIFFERENT if {left[0], right[0]} <= {"less", "at_most"} else UNDECIDED
    if left[0] == "equals":
        return decide_relations(left[-2:], right[-2:], signed=False)
    if left[0] in ("less", "at_most"):
        return decide_relations(left[1:], right[1:], signed=True)
    if len(left) != len(right):
        return DIFFERENT
    if left[0] == "matrix" and left[1:3] != right[1:3]:
        return DIFFERENT
    first = 3 if left[0] == "matrix" else 1
    if all(isinstance(side, tuple) and side[0] in RELATIONS for side in (*left[1:], *right[1:])):
        return decide_systems(left[1:], right[1:])
    verdicts = [decide(a, b) for a, b in zip(left[first:], right[first:], strict=True)]
    if DIFFERENT in verdicts:
        return DIFFERENT
    return UNDECIDED if UNDECIDED in verdicts else EQUAL


def decide_systems(left: tuple[Any, ...], right: tuple[Any, ...]) -> str:
    """Relations in any order: each of one side must be equal to another one of the other."""
    rest = list(right)
    verdict = EQUAL
    for equation in left:
        found = [decide(equation, other) for other in rest]
        if EQUAL in found:
            del rest[found.index(EQUAL)]
        elif UNDECIDED in found:
            verdict = UNDECIDED
        else:
            return DIFFERENT
    return verdict


def decide_relations(left: tuple[Any, ...], right: tuple[Any, ...], signed: bool) -> str:
    """``a ∘ b`` and ``c ∘ d`` mean the same if ``(a-b)/(c-d)`` is a constant, positive for <."""
    import sympy

    if any(isinstance(side, tuple) for side in (*left, *right)):
        return UNDECIDED
    above, below = left[0] - left[1], right[0] - right[1]
    if above.is_number and below.is_number:  # "0 = 1" and "2 = 3" hold equally and say no same
        return EQUAL if left == right else UNDECIDED
    if decide_expressions(below, sympy.S.Zero) != DIFFERENT:
        return UNDECIDED
    if decide_expressions(above, sympy.S.Zero) != DIFFERENT:
        return UNDECIDED
    ratio = above / below
    at = values(ratio)
    constant = sympy.nsimplify(at[0], rational=True, tolerance=1e-12) if at else None
    if constant is None or not constant.is_number or constant == 0:
        return UNDECIDED
    if signed and not (constant.is_real and constant > 0):
        return DIFFERENT
    return decide_expressions(above, constant * below)


def decide_side(left: Any, right: Any) -> str:
    """An equation beside an expression: its last side counts where the first says a name.

    ``x = 5`` answers 5 and ``f(x) = x^2`` answers ``x^2``, ``x^2 - 1 = 0`` does not answer 0.
    """
    import sympy

    equation, other = (left, right) if isinstance(left, tuple) else (right, left)
    if equation[0] != "equals" or not isinstance(other, sympy.Expr):
        return UNDECIDED if equation[0] == "equals" else DIFFERENT
    first, last = equation[1], equation[-1]
    if any(isinstance(side, tuple) for side in (first, last)):
        return UNDECIDED
    application = isinstance(first, sympy.Mul) and all(
        factor.is_Symbol or factor.is_number for factor in first.args
    )
    if first.is_Symbol or first.is_number or application or not last.is_number:
        return decide(last, other)
    return DIFFERENT


def decide_sets(left: Any, right: Any) -> str:
    """Sets and intervals; a set of one element is that element."""
    import sympy

    if not (isinstance(left, sympy.Set) and isinstance(right, sympy.Set)):
        found, other = (left, right) if isinstance(left, sympy.Set) else (right, left)
        if isinstance(found, sympy.FiniteSet) and len(found.args) == 1:
            return decide(found.args[0], other)
        return DIFFERENT
    if left == right:
        return EQUAL
    if isinstance(left, sympy.FiniteSet) and isinstance(right, sympy.FiniteSet):
        a, b = (sorted(side.args, key=sympy.default_sort_key) for side in (left, right))
        return decide_containers(("tuple", *a), ("tuple", *b))
    if isinstance(left, sympy.Interval) and isinstance(right, sympy.Interval):
        if (left.left_open, left.right_open) != (right.left_open, right.right_open):
            return DIFFERENT
        return decide_containers(("tuple", left.start, left.end), ("tuple", right.start, right.end))
    difference = left.symmetric_difference(right)
    return EQUAL if difference is sympy.S.EmptySet else UNDECIDED


def decide_expressions(left: Any, right: Any) -> str:
    """Numbers first, which show that expressions differ; then simplification."""
    import sympy

    undefined = (sympy.nan, sympy.zoo)
    if left.has(*undefined) or right.has(*undefined):
        return UNDECIDED
    infinities = (sympy.oo, -sympy.oo)
    if left in infinities or right in infinities:
        if left == right:
            return EQUAL
        return DIFFERENT if left.is_number and right.is_number else UNDECIDED
    if left.has(sympy.oo) or right.has(sympy.oo):
        return UNDECIDED
    difference = left - right
    if difference == 0:
        return EQUAL
    size = values(sympy.Abs(left) + sympy.Abs(right) + 1, left.free_symbols | right.free_symbols)
    at = values(difference, left.free_symbols | right.free_symbols)
    for value, scale in zip(at, size, strict=False):
        if abs(value) > abs(scale) * sympy.Float(10) ** (10 - DIGITS):
            return DIFFERENT
    if difference.is_number and not at:
        return UNDECIDED
    if sympy.expand(difference) == 0 or sympy.simplify(difference) == 0:
        return EQUAL
    if sympy.simplify(difference.rewrite(sympy.exp)) == 0:
        return EQUAL
    return EQUAL if difference.equals(0) is True else UNDECIDED


def values(expression: Any, symbols: Any = None) -> list[Any]:
    """The expression at up to four points, to 30 digits; those without a value are left out."""
    import sympy

    names = sorted(symbols if symbols is not None else expression.free_symbols, key=str)
    found = []
    for index, (numerator, denominator) in enumerate(POINTS if names else POINTS[:1]):
        point = {
            symbol: sympy.Rational(numerator + 2 * place * (-1) ** index, denominator + place)
            for place, symbol in enumerate(names)
        }
        value = expression.subs(point).evalf(DIGITS, maxn=200)
        found.append(value if value.is_number and value.is_finite else sympy.nan)
    return [] if not found or any(value is sympy.nan for value in found) else found
