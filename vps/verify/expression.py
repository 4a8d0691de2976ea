"""A bounded parser from tokens to expressions; what is rational is worked out on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from vps.verify import arithmetic
from vps.verify.limits import MAX_DEPTH, MAX_TOKENS, NotAnExpressionError, UndecidableError
from vps.verify.nodes import Node, call, combine, letter, negate, number
from vps.verify.tokens import (
    CONSTANTS,
    FUNCTIONS,
    GREEK,
    GREEK_NAMES,
    NOT_A_VALUE,
    Token,
    scan,
)

BRACKETS = {"(": ")", "[": "]", "{": "}"}
RELATIONS = {"<": "less", ">": "less", "<=": "at_most", ">=": "at_most"}


def parse(text: str) -> Node:
    """The expression that all of ``text`` is.

    Raises:
        NotAnExpressionError: text outside the grammar.
        UndecidableError: too long or too deep, or a part has no value or too large a one.
    """
    return parse_tokens(list(scan(text)))


def parse_tokens(tokens: Sequence[Token]) -> Node:
    """As :func:`parse`, for tokens."""
    if len(tokens) > MAX_TOKENS:
        raise UndecidableError(f"{len(tokens)} tokens")
    parser = Parser(tokens)
    try:
        node = parser.statement()
    except RecursionError:
        raise UndecidableError("nested too deep") from None
    if parser.position != len(parser.tokens):
        raise NotAnExpressionError(f"unexpected {parser.peek()!r}")
    return node


class Parser:
    """Recursive descent over at most 256 tokens, 40 levels deep."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.bars = 0

    def peek(self, ahead: int = 0) -> str:
        """Text of a token to come; empty after the last."""
        index = self.position + ahead
        return self.tokens[index].text if index < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        """Kind of a token to come."""
        index = self.position + ahead
        return self.tokens[index].kind if index < len(self.tokens) else ""

    def accept(self, *texts: str) -> str:
        """Pass one of ``texts`` if it comes next."""
        found = self.peek()
        if found and found in texts:
            self.position += 1
            return found
        return ""

    def expect(self, text: str) -> None:
        """Pass ``text``."""
        if not self.accept(text):
            raise NotAnExpressionError(f"expected {text!r}, got {self.peek()!r}")

    def deeper(self) -> None:
        """Enter one level of nesting."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UndecidableError("nested too deep")

    def statement(self) -> Node:
        """Expressions in a row, each an equation, an inequality or a plain one."""
        items = [self.relation()]
        while self.accept(","):
            items.append(self.relation())
        return items[0] if len(items) == 1 else ("tuple", *items)

    def relation(self) -> Node:
        """``a``, ``a = b = c``, ``a < b``, or ``a < b < c`` as a tuple of two."""
        sides = [self.sum()]
        while self.accept("="):
            sides.append(self.sum())
        if len(sides) > 1:
            return ("equals", *sides)
        relations: list[Node] = []
        while sign := self.accept(*RELATIONS):
            sides.append(self.sum())
            left, right = sides[-2:] if sign[0] == "<" else sides[:-3:-1]
            relations.append((RELATIONS[sign], left, right))
        if not relations:
            return sides[0]
        return relations[0] if len(relations) == 1 else ("tuple", *relations)

    def sum(self) -> Node:
        """Terms with signs between them."""
        self.deeper()
        node = self.product()
        while sign := self.accept("+", "-"):
            node = combine("add" if sign == "+" else "subtract", node, self.product())
        self.depth -= 1
        return node

    def product(self) -> Node:
        """Factors with ``*``, ``/`` or nothing between them."""
        node = self.signed(self.power)
        while True:
            if self.times():
                node = combine("multiply", node, self.signed(self.power))
            elif self.accept("/"):
                node = combine("divide", node, self.signed(self.power))
            elif self.starts_factor():
                node = combine("multiply", node, self.power())
            else:
                return node

    def times(self) -> bool:
        """Pass ``*`` or an ``x`` between two numbers."""
        if self.accept("*"):
            return True
        before = self.tokens[self.position - 1].kind
        if self.peek() in ("x", "X") and before == "number" and self.kind(1) == "number":
            self.position += 1
            return True
        return False

    def starts_factor(self) -> bool:
        """Whether what comes next is multiplied without a sign; numbers are not."""
        if self.kind() in ("word", "command"):
            return True
        return self.peek() in ("(", "[", "{") or (self.peek() == "|" and not self.bars)

    def signed(self, operand: Callable[[], Node]) -> Node:
        """An operand after any signs."""
        negative = False
        while sign := self.accept("-", "+"):
            negative ^= sign == "-"
        node = operand()
        return negate(node) if negative else node

    def power(self) -> Node:
        """A factor with its exponent; ``a^b^c`` is ``a^(b^c)``."""
        base = self.postfix()
        if self.accept("^", "**"):
            return combine("power", base, self.exponent())
        return base

    def exponent(self) -> Node:
        """What follows a power sign."""
        self.deeper()
        node = self.signed(self.power)
        self.depth -= 1
        return node

    def postfix(self) -> Node:
        """A primary with its factorial signs."""
        node = self.primary()
        while self.accept("!"):
            known = number(node)
            if known is None:
                node = ("factorial", node)
            else:
                node = ("number", arithmetic.factorial(known))
        return node

    def group(self) -> Node:
        """A bracketed expression or tuple."""
        opening = self.accept(*BRACKETS)
        if not opening:
            raise NotAnExpressionError(f"expected a bracket, got {self.peek()!r}")
        bars, self.bars = self.bars, 0
        items = [self.sum()]
        while opening != "{" and self.accept(","):
            items.append(self.sum())
        self.expect(BRACKETS[opening])
        self.bars = bars
        if len(items) > 1 and opening == "[":
            raise NotAnExpressionError("an interval")
        return items[0] if len(items) == 1 else ("tuple", *items)

    def primary(self) -> Node:
        """A number, a symbol, a function, a bracket or an absolute value."""
        kind, text = self.kind(), self.peek()
        if kind == "number":
            return self.mixed_number()
        if kind == "word":
            return self.word()
        if kind == "command":
            return self.command()
        if text in BRACKETS:
            return self.group()
        if text == "|":
            self.position += 1
            self.bars += 1
            node = self.sum()
            self.expect("|")
            self.bars -= 1
            return call("abs", node)
        raise NotAnExpressionError(f"unexpected {text!r}")

    def mixed_number(self) -> Node:
        r"""A number; with a proper fraction behind it (``1 3/4``, ``1\frac{3}{4}``) their sum."""
        whole = arithmetic.number(self.peek())
        self.position += 1
        if whole.denominator != 1:
            return ("number", whole)
        if self.kind() == "number" and self.peek(1) == "/" and self.kind(2) == "number":
            parts = (self.peek(0), self.peek(2))
            length = 3
        elif self.peek() == r"\frac" and [self.peek(i) for i in (1, 3, 4, 6)] == list("{}{}"):
            parts = (self.peek(2), self.peek(5))
            length = 7
        else:
            return ("number", whole)
        if not all(part.isdecimal() and len(part) < 10 for part in parts):
            return ("number", whole)
        numerator, denominator = map(int, parts)
        divides = self.position > 1 and self.tokens[self.position - 2].text in ("/", "^", "**")
        if divides or not 0 < numerator < denominator:  # "1/2 1/2" is no 1/(2 + 1/2)
            raise NotAnExpressionError("two numbers in a row")
        self.position += length
        return ("number", whole + Fraction(numerator, denominator))

    def word(self) -> Node:
        """A function, a constant, a symbol, or up to three letters multiplied."""
        text = self.peek()
        self.position += 1
        if text in FUNCTIONS:
            return self.function(FUNCTIONS[text])
        if text in GREEK_NAMES or len(text) == 1:
            return self.symbol(text)
        if text in CONSTANTS:
            return ("constant", CONSTANTS[text])
        if len(text) > 3 or not text.isalpha() or text.lower() in NOT_A_VALUE:
            raise NotAnExpressionError(f"the word {text[:20]!r}")
        node = letter(text[0])
        for character in text[1:-1]:
            node = combine("multiply", node, letter(character))
        return combine("multiply", node, self.symbol(text[-1]))

    def symbol(self, name: str) -> Node:
        """A symbol with its subscript: ``x_1``, ``x_{12}``, ``x1``."""
        glued = self.position < len(self.tokens) and (
            self.tokens[self.position].start == self.tokens[self.position - 1].end
        )
        if self.accept("_"):
            braces = self.accept("{")
            subscript = self.peek()
            if self.kind() not in ("number", "word") or len(subscript) > 8:
                raise NotAnExpressionError(f"the subscript {subscript[:20]!r}")
            self.position += 1
            if braces:
                self.expect("}")
            return ("symbol", f"{GREEK.get(name, name)}_{subscript}")
        if glued and self.kind() == "number" and self.peek().isdecimal() and len(self.peek()) < 4:
            self.position += 1
            return ("symbol", f"{GREEK.get(name, name)}_{self.peek(-1)}")
        return letter(name)

    def command(self) -> Node:
        """A LaTeX command."""
        name = self.peek()[1:]
        self.position += 1
        if name in ("frac", "sqrt"):
            self.deeper()
            node = self.fraction() if name == "frac" else self.root()
            self.depth -= 1
            return node
        if name in FUNCTIONS:
            return self.function(FUNCTIONS[name])
        if name in CONSTANTS:
            return ("constant", CONSTANTS[name])
        if name in GREEK_NAMES:
            return self.symbol(name)
        raise NotAnExpressionError(rf"the command \{name[:20]}")

    def fraction(self) -> Node:
        r"""The two arguments of ``\frac``."""
        numerator = self.argument()
        return combine("divide", numerator, self.argument())

    def argument(self) -> Node:
        r"""An argument in braces, or one digit or letter: ``\frac12`` is ``\frac{1}{2}``."""
        if self.peek() == "{":
            return self.group()
        text = self.peek()
        if self.kind() == "number" and text.isdecimal() and len(text) > 1:
            token = self.tokens[self.position]
            first = Token("number", text[0], token.start, token.start + 1)
            rest = Token("number", text[1:], token.start + 1, token.end)
            self.tokens = [
                *self.tokens[: self.position],
                first,
                rest,
                *self.tokens[self.position + 1 :],
            ]
            text = text[0]
        if self.kind() == "number":
            self.position += 1
            return ("number", arithmetic.number(text))
        return self.primary()

    def root(self) -> Node:
        r"""``\sqrt{a}``, ``\sqrt[n]{a}`` or ``\sqrt a``."""
        if self.accept("["):
            degree = self.sum()
            self.expect("]")
            known = number(degree)
            if known is None or known.denominator != 1 or not 2 <= known <= 100:
                raise UndecidableError("degree of a root")
            radicand = self.group()
            below = number(radicand)
            if below is not None and below < 0 and known.numerator % 2:
                return negate(combine("power", ("number", -below), ("number", 1 / known)))
            return combine("power", radicand, ("number", 1 / known))
        return call("sqrt", self.group() if self.peek() in ("{", "(") else self.primary())

    def function(self, name: str) -> Node:
        """A function with its argument, base and exponent: ``log_2 8``, ``sin^2 x``."""
        base = exponent = None
        if name == "log" and self.accept("_"):
            base = self.argument()
        if self.accept("^", "**"):
            exponent = self.exponent()
        self.deeper()
        if self.peek() in BRACKETS:
            argument = self.group()
        else:
            argument = self.signed(self.power)
            while self.starts_factor() and self.peek() not in BRACKETS:
                argument = combine("multiply", argument, self.power())
        self.depth -= 1
        if argument[0] == "tuple":
            raise NotAnExpressionError(f"several arguments of {name}")
        node = call(name, argument)
        if base is not None:
            node = combine("divide", node, call("log", base))
        return node if exponent is None else combine("power", node, exponent)
