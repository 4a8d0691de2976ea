r"""The answer in a text: last ``\boxed{}``, last ``####``, last "answer is", last number (SPEC §9).

A marked answer is read where its mark is, whatever else the text says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from vps.verify import latex
from vps.verify.compound import compound
from vps.verify.expression import parse_tokens
from vps.verify.limits import NotAnExpressionError, UndecidableError
from vps.verify.nodes import Node, value
from vps.verify.text import clean
from vps.verify.tokens import (
    BINARY,
    CLOSING,
    CONSTANTS,
    FUNCTIONS,
    GREEK_NAMES,
    OPENING,
    Token,
    known,
    runs,
    scan,
)
from vps.verify.units import Unit

Source = Literal["boxed", "hashes", "phrase", "text"]

BRACE = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{|\\.|[{}]", re.DOTALL)
PHRASE = re.compile(
    r"\banswer\s{0,3}(?:is\b|was\b|equals\b|:|=)(?!\s{0,3}not\b)[\s:]{0,9}", re.IGNORECASE
)
INLINE_LATEX = re.compile(r"\$([^$\n]{1,400})\$")
GLUE = frozenset({"*", "**", "/", "^", "!", "_"})
COMMAND = re.compile(r"\\([A-Za-z]+)")
COMMANDS = frozenset({"frac", "sqrt", *FUNCTIONS, *CONSTANTS, *GREEK_NAMES})
INTERVAL = re.compile(r"[(\[][^()\[\]]+,[^()\[\]]+[)\]]")
PLAIN_SET = re.compile(r"\{[^{}\\]+,[^{}\\]+\}")
ALTERNATIVES = re.compile(r"(?:,|\b)\s{1,9}(?:or|and)\s{1,9}")
SPACED_THOUSANDS = re.compile(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?")
MAX_LATEX = 400


@dataclass(frozen=True, slots=True)
class Answer:
    r"""What a text answers.

    Attributes:
        text: the marked part, or the whole text.
        source: where it was found.
        value: the number, exact; of an equation its last side, of several numbers the last.
        unit: names of pint with their exponents, where a known unit follows the number.
        expression: the parsed expression, a number too; ``None`` where there is none.
        latex: LaTeX beyond the grammar of ``expression``, for the worker.
        undecidable: an expression stands there that is not worked out (too large, ``1/0``), or
            the text was cut and no answer is in what is left.
    """

    text: str
    source: Source
    value: Fraction | None = None
    unit: Unit | None = None
    expression: Node | None = None
    latex: str | None = None
    undecidable: bool = False

    @property
    def words(self) -> str:
        """The text without case, punctuation and spacing."""
        return " ".join(re.findall(r"\w+", latex.plain(self.text).casefold()))


def extract_answer(text: str) -> Answer | None:
    """The answer that ``text`` gives; ``None`` for a text without any word or number.

    Args:
        text: any text; only its last 4096 characters are read, and nothing is evaluated but
            arithmetic on numbers of bounded size.

    Raises:
        TypeError: not a string.
    """
    cleaned, cut = clean(text)
    source, region = locate(cleaned)
    if not region:
        return Answer("", source, undecidable=True) if cut else None
    answer = read(region, source)
    if cut and source == "text" and answer.value is None and answer.expression is None:
        return replace(answer, undecidable=True)
    return answer


def extract_number(text: str) -> Fraction | None:
    """The number that ``text`` answers, exact and without its unit; ``None`` where there is none.

    Args:
        text: as for :func:`extract_answer`.
    """
    answer = extract_answer(text)
    return answer.value if answer else None


def locate(text: str) -> tuple[Source, str]:
    """The part of a cleaned text that holds the answer, and what marks it."""
    boxed = last_box(text)
    if boxed:
        return "boxed", boxed
    hashes = text.rfind("####")
    if hashes >= 0:
        line = first_line(text[hashes:].lstrip("#"))
        if line:
            return "hashes", line
    phrases = list(PHRASE.finditer(text))
    if phrases:
        line = first_line(text[phrases[-1].end() :])
        if line:
            return "phrase", line
    return "text", text.strip()


def last_box(text: str) -> str:
    r"""Content of the last ``\boxed{}`` that is closed and not empty."""
    opened: list[int | None] = []
    best = (-1, -1)
    for brace in BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(None)
        elif brace[0][0] == "\\" and brace[0][-1] == "{" and len(brace[0]) > 2:
            opened.append(brace.end())
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start is not None and start > best[0] and text[start : brace.start()].strip():
                best = (start, brace.start())
    return text[best[0] : best[1]].strip() if best[0] >= 0 else ""


def first_line(text: str) -> str:
    """The first line that is not empty; the next one with it where it ends in a colon."""
    lines = [line for line in text.lstrip().split("\n", 9)[:9] if line.strip()]
    if len(lines) > 1 and lines[0].rstrip().endswith(":"):
        return lines[1].strip()
    return lines[0].strip() if lines else ""


def read(region: str, source: Source) -> Answer:
    """Number, unit and expression of a region."""
    text = latex.plain(region).strip().rstrip(".,;:? \t\n")
    if source == "phrase":
        text = text.rstrip("!.,;:? ")
    if SPACED_THOUSANDS.fullmatch(text):
        text = text.replace(" ", "")
    answer = Answer(region, source)
    tokens = list(scan(text))
    quantity = compound(tokens)
    if quantity and (source == "text" or quantity.first is tokens[0]):
        node: Node = ("number", quantity.value)
        return replace(answer, value=quantity.value, unit=quantity.unit, expression=node)
    whole = read_whole(text, answer) or read_alternatives(text, answer)
    if whole is not None:
        return whole
    if source == "text":
        inline = list(INLINE_LATEX.finditer(region))
        if inline and not re.search(r"\w", region[inline[-1].end() :]):
            content = latex.plain(inline[-1][1]).strip()
            whole = read_whole(content, answer) if informative(list(scan(content))) else None
            if whole is not None:
                return whole
    notation = foreign(region)
    if notation is not None:
        return replace(answer, latex=notation)
    return read_prose(text, answer) if source == "text" else read_first(text, answer)


def read_whole(text: str, answer: Answer) -> Answer | None:
    """The answer where all of the text is one expression, with a unit or without."""
    if "\n" in text:
        return None
    found = list(scan(text))
    if not found:
        return None
    unit = found[-1].unit
    expression = found[:-1] if unit else found
    if any(token.kind in ("junk", "unit") for token in expression):
        return None
    if not (len(text) < 8 and letter_alone(expression) or letters_only(expression)):
        # Runs leave out the commas after which a sentence goes on; here a tuple does.
        covered = sum(len(run) for run in runs(text, 3))
        if covered < len(found) - sum(token.text == "," for token in expression):
            return None
    try:
        node = parse_tokens(expression)
    except UndecidableError:
        return replace(answer, undecidable=True)
    except NotAnExpressionError:
        return None
    return replace(answer, value=value(node), unit=unit, expression=node)


def read_alternatives(text: str, answer: Answer) -> Answer | None:
    """The answer where all of the text is expressions with "and" or "or" between them.

    Of inequalities they say different things, which is not worked out.
    """
    joined = ALTERNATIVES.sub(", ", text)
    whole = read_whole(joined, answer) if joined != text else None
    if whole is not None and re.search("[<>]", text):
        return replace(answer, undecidable=True)
    return whole


def letters_only(tokens: Sequence[Token]) -> bool:
    """Whether a text is mathematics whose unknown words all have one letter: ``2 x y``."""
    return informative(tokens) and all(
        token.kind != "word" or len(token.text) == 1 or known(token.text) for token in tokens
    )


def letter_alone(tokens: Sequence[Token]) -> bool:
    """Whether a text is one letter, in brackets or not."""
    inner = [token for token in tokens if token.text not in OPENING | CLOSING]
    return len(inner) == 1 and len(inner[0].text) == 1


def read_first(text: str, answer: Answer) -> Answer:
    """The answer from the first stretch of mathematics behind a mark."""
    for run in runs(text, 1 if answer.source == "phrase" else 3):
        if informative(run):
            return read_run(text, run, answer, last=False)
    return answer


def read_prose(text: str, answer: Answer) -> Answer:
    """The answer from the last number of a text, and the last expression."""
    expression = None
    for line in reversed(text.split("\n")):
        for run in reversed(runs(line)):
            if has_number(run):
                found = read_run(line, run, answer, last=True)
                if expression is not None and not found.undecidable:
                    found = replace(found, expression=expression)
                return found
            if expression is None and informative(run):
                expression = read_run(line, run, answer, last=True).expression
    return replace(answer, expression=expression)


def has_number(run: Sequence[Token]) -> bool:
    """Whether a number is in a run."""
    return any(token.kind == "number" for token in run)


def informative(run: Sequence[Token]) -> bool:
    """Whether a run says something: a number, a command, or an operator beside a symbol."""
    if any(token.kind in ("number", "command") for token in run):
        return True
    words = sum(token.kind == "word" for token in run)
    return words > 0 and any(token.text in BINARY for token in run)


def read_run(text: str, run: Sequence[Token], answer: Answer, last: bool) -> Answer:
    """The answer that one stretch of mathematics gives."""
    unit = run[-1].unit
    tokens = trim(text, list(run[:-1] if unit else run))
    if last and is_range(tokens):
        tokens = tokens[-1:]
    try:
        node = parse_tokens(tokens)
    except UndecidableError:
        return replace(answer, undecidable=True)
    except NotAnExpressionError:
        if any(token.kind == "command" for token in tokens):
            return replace(answer, undecidable=True)
        plain = plain_number(tokens, last)
        if plain is None:
            return replace(answer, undecidable=has_number(tokens))
        unit = unit if plain is tokens[-1] else None
        return read_run(text, [plain], replace(answer, unit=unit), last)
    if last and node[0] == "equals" and node[-1][0] == "number":
        node = node[-1]  # "so a + b = 7" in a sentence says 7
    return replace(answer, value=value(node), unit=unit or answer.unit, expression=node)


def trim(text: str, tokens: list[Token]) -> list[Token]:
    """A run without operators and brackets that lead to nothing, in one pass from both ends.

    A hyphen after a word and a bullet before a space are no signs; a power or product that a
    word is part of (``foo**9``) stays, and is no number.
    """
    start, end = 0, len(tokens)
    excess = sum((token.text in OPENING) - (token.text in CLOSING) for token in tokens)
    bars = sum(token.text == "|" for token in tokens)
    while start < end:
        first, last = tokens[start], tokens[end - 1]
        closes = last.text == "|" and bars % 2 == 0
        if last.text in BINARY | OPENING | {"!", "_", ",", "|"} and not closes:
            gone, end = last, end - 1
        elif last.text in CLOSING and excess:
            gone, end = last, end - 1
        elif first.text in CLOSING | {"=", "<", ">", "<=", ">=", ",", "+"}:
            gone, start = first, start + 1
        elif first.text in OPENING and excess:
            gone, start = first, start + 1
        elif first.text in ("-", "*", "**") and not sign(text, tokens[start : start + 2]):
            gone, start = first, start + 1
        else:
            break
        excess -= (gone.text in OPENING) - (gone.text in CLOSING)
        bars -= gone.text == "|"
    return tokens[start:end]


def sign(text: str, tokens: Sequence[Token]) -> bool:
    """Whether the leading operator belongs to the number behind it."""
    first = tokens[0]
    glued_before = first.start > 0 and not text[first.start - 1].isspace()
    if first.text == "-":
        gap = len(tokens) < 2 or tokens[1].start > first.end
        return not gap and not (glued_before and text[first.start - 1].isalnum())
    return glued_before


def is_range(tokens: Sequence[Token]) -> bool:
    """Whether a run is ``10-15`` or ``12/05/2020``: glued numbers, all but one by signs alike."""
    signs = [token.text for token in tokens[1::2]]
    return (
        (signs == ["-"] or signs in (["-", "-"], ["/", "/"]))
        and len(tokens) % 2 == 1
        and all(token.kind == "number" for token in tokens[::2])
        and all(a.end == b.start for a, b in pairwise(tokens))
    )


def plain_number(tokens: Sequence[Token], last: bool) -> Token | None:
    """A number of a run that no power, product or factorial touches."""
    candidates = [
        token
        for index, token in enumerate(tokens)
        if token.kind == "number"
        and not (index and tokens[index - 1].text in GLUE)
        and not (index + 1 < len(tokens) and tokens[index + 1].text in GLUE | {"("})
        and not any(
            other.kind in ("number", "word")
            and (other.end == token.start or other.kind == "number" and other.start == token.end)
            for other in tokens[max(0, index - 1) : index + 2]
        )
    ]
    if not candidates or last and candidates[-1] is not last_number(tokens):
        return None
    return candidates[-1] if last else candidates[0]


def last_number(tokens: Sequence[Token]) -> Token | None:
    """The last number of a run."""
    return next((token for token in reversed(tokens) if token.kind == "number"), None)


def foreign(region: str) -> str | None:
    r"""LaTeX beyond the parser's grammar that a region is, or that its last ``$...$`` holds."""
    inline = list(INLINE_LATEX.finditer(region))
    if inline and not re.search(r"\d", region[inline[-1].end() :]):
        text = inline[-1][1].strip()
    else:
        text = region.strip().strip("$").strip()
    if len(text) > MAX_LATEX or "\n" in text:
        return None
    if PLAIN_SET.fullmatch(text):
        return rf"\{{{text[1:-1]}\}}"
    if INTERVAL.fullmatch(text.replace(r"\left", "").replace(r"\right", "")) or r"\{" in text:
        return text
    commands = COMMAND.findall(latex.plain(text))
    return None if all(name in COMMANDS for name in commands) else text
