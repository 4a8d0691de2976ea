"""Text to tokens: numbers, words, operators, LaTeX commands, units; everything else is junk.

One pass with a pattern whose alternatives never overlap by more than a literal, so linear.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from vps.verify import units

GREEK = {
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "δ": "delta",
    "ε": "epsilon",
    "θ": "theta",
    "κ": "kappa",
    "λ": "lambda",
    "μ": "mu",
    "ν": "nu",
    "ρ": "rho",
    "σ": "sigma",
    "τ": "tau",
    "φ": "phi",
    "χ": "chi",
    "ψ": "psi",
    "ω": "omega",
    "Δ": "Delta",
    "Σ": "Sigma",
    "Φ": "Phi",
    "Ω": "Omega",
}
GREEK_NAMES = frozenset(GREEK.values()) | {"eta", "xi", "zeta", "varepsilon", "varphi"}
CONSTANTS = {"pi": "pi", "e": "e", "i": "i", "infty": "infinity"}
FUNCTIONS = {
    **{name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{name: name for name in ("sinh", "cosh", "tanh", "asin", "acos", "atan")},
    **{f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan")},
    **{name: name for name in ("exp", "log", "ln", "sqrt", "abs")},
}
NOT_A_VALUE = frozenset({"nan", "inf", "oo"})

TOKEN = re.compile(
    r"""
    (?P<space>\s+)
    |(?P<hexadecimal>0[xX][0-9a-fA-F]+(?!\w))
    |(?P<number>
        (?:\d{1,3}(?:,\d{3})++(?![\d,])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
        (?:[eE][-+]?\d+(?![A-Za-z\d]))?
    )
    |(?P<command>\\[A-Za-z]+)
    |(?P<word>[A-Za-zα-ωΑ-Ω]+(?:'[A-Za-z]+)*+)
    |(?P<operator>\*\*|<=|>=|[-+*/^()\[\]{}=<>!_|,])
    |(?P<junk>.)
    """,
    re.VERBOSE | re.DOTALL,
)
# "\\pi m" has a unit, "\\pi h" is a product.
AFTER_PI = re.compile("m(?![A-Za-z])|[A-Za-z]{2}")
SENTENCE_COMMA = re.compile(r",(?=\s|$)")
OPENING, CLOSING = frozenset("([{"), frozenset(")]}")
BINARY = frozenset({"+", "-", "*", "/", "^", "**", "=", "<", ">", "<=", ">="})


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of text: its kind, and for a unit what it names."""

    kind: str
    text: str
    start: int
    end: int
    unit: units.Unit | None = None


def scan(text: str) -> Iterator[Token]:
    """Every token of ``text`` but the spaces."""
    position = 0
    after_value = after_pi = after_word = False
    letter_power = False  # in the exponent of a letter: "r^2 h" is no "2 hours", "10^3 m" is metres
    while position < len(text):
        if after_value or after_pi:
            found = unit_at(text, position)
            if found and (after_value or AFTER_PI.match(found.text)):
                yield found
                position, after_value, after_pi = found.end, False, False
                continue
        token = TOKEN.match(text, position)
        if token is None:
            return
        kind, position = token.lastgroup or "junk", token.end()
        if kind == "space":
            continue
        kind = "junk" if kind == "hexadecimal" else kind
        if token[0] in ("^", "**"):
            letter_power = after_word
        elif kind != "number" and token[0] not in ("{", "}", "-"):
            letter_power = False
        after_word = kind == "word"
        after_value = (kind == "number" or token[0] in CLOSING) and not letter_power
        after_pi = token[0] in (r"\pi", "pi")
        yield Token(kind, token[0], token.start(), position)


# What may not follow a unit; there the letter is a variable: "3m + 2", "2h(x)".
CONTINUES = re.compile(r"[ \t]*(?:[-+*^=(/]|\\[A-Za-z])[ \t]*[\w(\\]|\w")


def unit_at(text: str, position: int) -> Token | None:
    """The unit after a number, if one stands there and nothing goes on from it."""
    start = position
    while start < len(text) and text[start] in " \t" and start - position < 4:
        start += 1
    if start == len(text) or not (text[start].isalpha() or text[start] in "°%"):
        return None
    found = units.match(text, start)
    if found is None or CONTINUES.match(text, found.end):
        return None
    return Token("unit", text[start : found.end], start, found.end, found.unit)


def known(word: str) -> bool:
    """Whether a word of several letters is a function, a constant or a Greek letter."""
    return word in FUNCTIONS or word in CONSTANTS or word in GREEK_NAMES


def runs(text: str, letters: int = 1) -> list[list[Token]]:
    """Stretches of mathematics in prose: tokens between words, sentence marks and other junk.

    Args:
        text: plain text.
        letters: the longest unknown word that may be a product of variables. It counts as
            mathematics where it touches a number or an operator.
    """
    tokens = list(scan(text))
    found: list[list[Token]] = [[]]
    depth = 0
    for index, token in enumerate(tokens):
        before = tokens[index - 1] if index else None
        after = tokens[index + 1] if index + 1 < len(tokens) else None
        if token.text in OPENING:
            depth += 1
        elif token.text in CLOSING:
            depth = max(0, depth - 1)
        if token.kind == "junk" or (
            token.kind == "word"
            and not follows_function(tokens, index)
            and prose(token, before, after, letters)
        ):
            depth = 0
            found.append([])
            continue
        if token.text == "," and depth == 0 and SENTENCE_COMMA.match(text, token.start):
            found.append([])
            continue
        if before and "\n" in text[before.end : token.start]:
            found.append([])
        found[-1].append(token)
        if token.kind == "unit":
            found.append([])
    return [run for run in found if run]


def follows_function(tokens: list[Token], index: int) -> bool:
    """Whether a short word is the argument of a function: ``sin x``, ``sin^2 x``."""
    at = index - 1
    if at >= 2 and tokens[at].kind == "number" and tokens[at - 1].text in ("^", "**"):
        at -= 2
    if at < 0 or len(tokens[index].text) > 1 or tokens[at].kind not in ("word", "command"):
        return False
    return tokens[at].text.lstrip("\\") in FUNCTIONS


def prose(token: Token, before: Token | None, after: Token | None, letters: int) -> bool:
    """Whether a word belongs to the sentence rather than to a formula."""
    if len(token.text) > 1 and known(token.text):
        return False
    if len(token.text) > letters:
        return True
    if token.text in ("x", "X") and before and after:
        if before.kind == after.kind == "number":
            return False
    for other, gap in (
        (before, token.start - before.end if before else 1),
        (after, after.start - token.end if after else 1),
    ):
        if other is None or other.kind in ("junk", "unit"):
            continue
        hyphen = other.text == "-" and other is after and gap == 0
        if other.text in BINARY and not hyphen:
            return False
        if gap == 0 and other.kind != "word" and other.text not in ("!", ","):
            return False
    return True
