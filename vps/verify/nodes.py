"""What an expression is made of; operations on rational numbers are worked out.

Nodes are tuples, their kind first, that JSON can carry to the worker: ``("number", Fraction)``,
``("symbol", name)``, ``("constant", name)``, ``("call", name, argument)``, ``("add", a, b)`` and
alike ``subtract multiply divide power``, ``("factorial", a)``, ``("equals", a, b, ...)``,
``("less", a, b)``, ``("at_most", a, b)``, ``("tuple", a, b, ...)``.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from vps.verify import arithmetic
from vps.verify.limits import MAX_EXPONENT, UndecidableError
from vps.verify.tokens import CONSTANTS, GREEK

Node = tuple[Any, ...]


def value(node: Node | None) -> Fraction | None:
    """The number that an expression is, the last side of an equation, the last of several."""
    while node is not None and node[0] in ("equals", "tuple"):
        node = node[-1]
    return node[1] if node is not None and node[0] == "number" else None


def number(node: Node) -> Fraction | None:
    """The value of a node that is a number."""
    return node[1] if node[0] == "number" else None


def combine(kind: str, left: Node, right: Node) -> Node:
    """A binary node, or its value where both operands are numbers."""
    a, b = number(left), number(right)
    if kind == "divide" and b == 0:
        raise UndecidableError("division by zero")
    if kind == "power":
        if b is not None and abs(b) > MAX_EXPONENT and a is None:
            raise UndecidableError(f"exponent {b}")
        if a is not None and b is not None:
            if b.denominator == 1:
                return ("number", arithmetic.bounded(arithmetic.power(a, int(b))))
            root = arithmetic.square_root(a) if b.denominator == 2 else None
            if root is not None:
                return ("number", arithmetic.bounded(arithmetic.power(root, b.numerator)))
            if abs(b) > MAX_EXPONENT or b.denominator > MAX_EXPONENT:
                raise UndecidableError(f"exponent {b}")
    elif a is not None and b is not None:
        match kind:
            case "add":
                return ("number", arithmetic.bounded(a + b))
            case "subtract":
                return ("number", arithmetic.bounded(a - b))
            case "multiply":
                return ("number", arithmetic.bounded(a * b))
            case "divide":
                return ("number", arithmetic.divide(a, b))
    return (kind, left, right)


def negate(node: Node) -> Node:
    """``-node``."""
    return combine("multiply", ("number", Fraction(-1)), node)


def call(name: str, argument: Node) -> Node:
    """A function node, or its value where that is rational."""
    known = number(argument)
    if known is not None and name == "sqrt":
        root = arithmetic.square_root(known)
        if root is not None:
            return ("number", root)
    if known is not None and name == "abs":
        return ("number", abs(known))
    return ("call", "log" if name == "ln" else name, argument)


def letter(name: str) -> Node:
    """A symbol or a constant of one letter; Greek by its name."""
    if name in CONSTANTS:
        return ("constant", CONSTANTS[name])
    return ("symbol", GREEK.get(name, name))
