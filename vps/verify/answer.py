"""The answer in a text: a plain one worked out here, a formula for the worker, or words (SPEC §9).

A marked answer is read where its mark is, whatever else the text says.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction

from vps.verify import arithmetic, kinds, units
from vps.verify.arithmetic import LITERAL, UndecidableError
from vps.verify.text import Source, clean, locate, undressed

MAX_FORMULA = 400
GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau "
    "phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega"
).split()
FUNCTIONS = (
    "sin cos tan cot sec csc sinh cosh tanh asin acos atan arcsin arccos arctan exp log ln sqrt abs"
).split()
WORDS_OF_FORMULAS = frozenset([*GREEK, *FUNCTIONS, "pi", "infinity", "mod", "or", "and", "in"])
GREEK_LETTERS = "αβγδεζηθκλμνξρστυφχψωΓΔΘΛΣΦΨΩ"
NOT_A_VALUE = ("nan", "inf", "oo")
# Two numbers in a row, a base, a division by zero, a comment: no formula.
BROKEN = re.compile(
    rf"(?<![_^\d.,])(?>{LITERAL})(?:\s+\d|\.\d|_)|(?<![A-Za-z\\])[A-Za-z]\s+\d|\d[eE]\d|\d'"
    r"|[,;]\s{0,3}[,;]|%|^\s*[,;/^!]|/\s?0(?![.\d])"
)
POWER = r"(?:\^|\*\*)[({\s]{0,4}-?"
HUGE = re.compile(
    rf"(?<!\}}){POWER}(?:\d{{5,}}|\d{{2,}}[)}}\s]{{0,4}}{POWER}\d|\d[)}}\s]{{0,4}}{POWER}\d+[)}}\s]{{0,4}}{POWER}\d)"
)
OPENING, CLOSING = ("(", "[", "{", "\\{"), (")", "]", "}", "\\}")
TOKEN = re.compile(
    rf"(?P<number>{LITERAL})|(?P<command>\\[A-Za-z]+|\\[{{}}|])|(?P<word>[^\W\d_]+(?:'[^\W\d_]+)*+)"
    r"|(?P<sign>\*\*|<=|>=|!=|[-+*/^()\[\]{}=<>!_|,;:])|(?P<junk>\S)"
)
BINARY = frozenset({"+", "-", "*", "/", "^", "**", "=", "<", ">", "<=", ">=", "!="})
# What stands before the value in "x = 5", "f(2) ≈ 5", "3 + 4 = 7".
NAME = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?\w{1,8}\}?)?'?(?:\(\w{1,3}(?:,\s?\w{1,3})?\))?")
EQUALS = re.compile(r"(?<![<>!:=])(?::?=|\\approx(?![A-Za-z])|≈)")
LETTER = re.compile(r"[(\[]?\s?([A-Za-z])(?:\s?,\s?[A-Za-z]){0,9}\s?[)\]]?")
INLINE = re.compile(r"\$([^$\n]{1,400})\$|\\\(((?:[^\\\n]|\\[^)\n]){1,400})\\\)")
LIST_BEFORE = re.compile(
    r"(?:(?:[\d%°][^\S\n]{0,3}(?:-|to|or|and|through|;)|\bbetween\b[^.\n]{1,40}\band"
    r"|\bfrom\b[^.\n]{1,40}\bto)[^\S\n]{0,3}|\d[:/])[$€£]?$"
)
ROW_BEFORE = re.compile(r"\d[^\S\n]?([^\W\d_]{1,12})?[^\S\n]{1,3}$")
COMMA_BEFORE = re.compile(r"\d,\s{1,3}[$€£]?$")


@dataclass(frozen=True, slots=True)
class Answer:
    r"""What a text answers.

    Attributes:
        text: the marked part, or the whole text.
        source: where it was found.
        value: the number, exact; of "x = 5" the 5. ``None`` for several numbers.
        unit: names of pint, or money, with their exponents, where a known unit is named.
        parts: the kind of another plain answer and its numbers: ``("ratio", 3, 2)``, and
            ``time``, ``date``, ``range`` alike.
        formula: algebra or LaTeX that the worker reads.
        undecidable: an answer stands there that is not worked out (too large, ``1/0``) or of
            which a part would be dropped, or the text was cut and no answer is in what is left.
    """

    text: str
    source: Source
    value: Fraction | None = None
    unit: units.Unit | None = None
    parts: kinds.Parts | None = None
    formula: str | None = None
    undecidable: bool = False

    @property
    def says_words(self) -> bool:
        """Whether neither a number nor any mathematics was found."""
        return self.value is None and not (self.parts or self.formula or self.undecidable)

    @property
    def words(self) -> str:
        """The text without case, punctuation and spacing."""
        return " ".join(re.findall(r"\w+|[-+*/^=<>&#@']", undressed(self.text).casefold()))


def extract_answer(text: str) -> Answer | None:
    """Find the answer that ``text`` gives; ``None`` for a text without any word or number.

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
    try:
        answer = read(region, source)
    except (UndecidableError, RecursionError):
        answer = Answer(region, source, undecidable=True)
    if cut and source == "text" and answer.value is None and answer.formula is None:
        return replace(answer, undecidable=True)
    return answer


def extract_number(text: str) -> Fraction | None:
    """Return the number that ``text`` answers, exact and without its unit, or ``None``.

    Args:
        text: as for :func:`extract_answer`.
    """
    answer = extract_answer(text)
    return answer.value if answer else None


def read(region: str, source: Source) -> Answer:
    """Read a region: all of it as one answer, else a formula at its end, else from its prose.

    Raises:
        UndecidableError: the answer is not worked out, or a part of it would be dropped.
    """
    answer = Answer(region, source)
    text = undressed(region).strip().rstrip(".,;:? \t\n")
    if source == "phrase":
        text = re.split(r"\s(?:because|since)\b", text)[0].rstrip("!.,;:? ")
    whole = read_whole(text, answer)
    if whole is not None:
        return whole
    inline = list(INLINE.finditer(region))
    if inline and source != "boxed" and not re.search(r"\w", region[inline[-1].end() :]):
        content = undressed(inline[-1][1] or inline[-1][2] or "").strip()
        before = LIST_BEFORE.search(region[: inline[-1].start()].replace("$", " "))
        whole = None if before else read_whole(content, answer)
        if whole is not None and not whole.says_words:
            return whole
    return read_prose(text, answer, last=source == "text")


def read_whole(text: str, answer: Answer) -> Answer | None:
    """Read a text of which every part counts; ``None`` where it is prose."""
    about = kinds.ABOUT.match(text)
    text = text[about.end() :] if about else text
    bullet = re.match(r"[-*+]\s+(?=[\d$.])|[,;:]\s*", text)
    text = text[bullet.end() :] if bullet else text
    if re.fullmatch(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?", text):
        text = text.replace(" ", "")
    if structure := kinds.structure(text):
        return replace(answer, parts=structure[0], unit=structure[1])
    digits = kinds.based(text)
    if digits is not None:
        return replace(answer, value=digits)
    found = read_quantity(text)
    if found:
        return replace(answer, value=found.value, unit=found.unit)
    sides = EQUALS.split(text)
    if len(sides) > 1:
        last = read_quantity(sides[-1].strip())
        named = NAME.fullmatch(sides[0].strip())
        if last and not named:
            values = {arithmetic.evaluate(side) for side in sides[:-1]}
            if None not in values and values != {last.value}:
                raise UndecidableError("sides that differ")
        if last and (named or None not in values):
            relation = text if named and len(text) <= MAX_FORMULA else None
            return replace(answer, value=last.value, unit=last.unit, formula=relation)
    formula = read_formula(text, answer)
    if formula is None and len(text) < 400 and kinds.LISTED.fullmatch(text):
        raise UndecidableError("several quantities")
    return formula


def read_quantity(text: str) -> kinds.Quantity | None:
    """Read a number with its unit, or several units, that nouns alone may follow."""
    minus = kinds.MINUS.match(text)
    if minus:
        found = read_quantity(text[minus.end() :])
        return found and found._replace(value=-found.value)
    try:
        for found in (kinds.compound(text), kinds.quantity(text)):
            if found and (found.end == len(text) or kinds.NOUNS.fullmatch(text, found.end)):
                return found
    except kinds.ChangedError:
        return None
    return None


def read_formula(text: str, answer: Answer) -> Answer | None:
    """Take a text that is mathematics from end to end, without the unit at its end."""
    if len(text) > MAX_FORMULA:
        return None
    if HUGE.search(text):
        raise UndecidableError("a tower of powers")
    tail = re.search(r"(?<=[\s\d)}\]])([^\W\d_][^\\{}=<>]{0,30}|[°%])$", text)
    head = text[: tail.start()] if tail else ""
    found = units.match(text, tail.start(1)) if tail else None
    if tail and found and found.end == len(text) and is_formula(head, answer.source):
        constant = not re.search(r"(?<![\\A-Za-z])[A-Za-z]", head)
        metres = tail[1] == "m" and head[-1].isspace() and "\\" in head
        if len(tail[1]) > 1 or constant and (metres or tail[1] in "°%"):
            return replace(answer, formula=head.strip(), unit=found.unit)
    if is_formula(text, answer.source):
        return replace(answer, formula=text)
    return None


def is_formula(text: str, source: Source) -> bool:
    """Tell whether a text has no word but those of formulas; three letters may be a product."""
    text = re.sub(r"\\(?:begin|end)\{[a-z]{1,12}\}", " ", text)
    tokens = list(TOKEN.finditer(text))
    if not tokens or BROKEN.search(text) or tokens[-1][0] in BINARY:
        return False
    opened = sum((token[0] in OPENING) - (token[0] in CLOSING) for token in tokens)
    for before, token, after in zip([None, *tokens], tokens, [*tokens[1:], None], strict=False):
        word = token["word"]
        if token["junk"] and token[0] not in "°'&\\":
            return False
        if word and not (word.isascii() or len(word) == 1 and word in GREEK_LETTERS):
            return False
        if word and len(word) > 1 and word not in WORDS_OF_FORMULAS:
            product = len(word) < 4 and word.lower() not in NOT_A_VALUE
            differential = word[0] == "d" and len(word) == 2 and "\\int" in text
            if not product or not differential and is_prose(token, before, after, 3):
                return False
    return opened == 0 and (informative(text) or bool(LETTER.fullmatch(text)))


def informative(text: str) -> bool:
    """Tell whether a text says something: a number, a command, or an operator by a symbol."""
    found = [token for token in TOKEN.finditer(text) if token.lastgroup != "junk"]
    words = any(token["word"] for token in found)
    return any(
        token.lastgroup in ("number", "command") or words and token[0] in BINARY for token in found
    )


def read_prose(text: str, answer: Answer, last: bool) -> Answer:
    """Read the last number or formula of a text, or the first behind a mark."""
    if not last:
        for start, end in runs(text, 1 if answer.source == "phrase" else 3):
            if informative(text[start:end]):
                return read_run(text, start, end, answer)
        return checked(answer)
    at = len(text)
    for line in reversed(text.split("\n")):
        at -= len(line)
        for start, end in reversed(runs(line)):
            if informative(line[start:end]):
                whole = read_compound(line, end, answer)
                if whole is not None:
                    return whole
                before = "" if "=" in line[start:end] else line[max(0, start - 60) : start]
                alone = not re.search(r"[^\W\d_]{3}", line[end:])
                row = ROW_BEFORE.search(before)
                row = row if row and (not row[1] or units.lookup(row[1])) else None
                if row or LIST_BEFORE.search(before) or alone and COMMA_BEFORE.search(before):
                    raise UndecidableError("several numbers")
                return read_run(line, start, end, answer)
        at -= 1
    return checked(answer)


def read_compound(line: str, end: int, answer: Answer) -> Answer | None:
    """Read units that reach to ``end`` in a line, as in "5 km/h" or "1 hour and 30 minutes"."""
    for start, stop in runs(line)[-kinds.MAX_PAIRS - 1 :]:
        with suppress(kinds.ChangedError):
            found = kinds.compound(line, start)
            if found is None and stop < end:
                found = kinds.quantity(line, start, stop)
            if found and found.end >= end:
                return replace(answer, value=found.value, unit=found.unit)
    return None


def checked(answer: Answer) -> Answer:
    """Return an answer in words; LaTeX that says more than words is undecidable."""
    commands = "\\" in undressed(answer.text)
    return replace(answer, undecidable=True) if commands else answer


def read_run(text: str, start: int, end: int, answer: Answer) -> Answer:
    """Read one stretch of mathematics: a number with the unit behind it, or a formula."""
    start, end = trimmed(text, start, end)
    sides = list(EQUALS.finditer(text, start, end))
    found = None
    if not re.search(r"(?<![<>])[<>]", text[start:end]):
        first = sides[-1].end() if sides else start
        first += len(text[first:]) - len(text[first:].lstrip())
        before = re.search(r"(?:US)?[$€£¥₹₽₩]\s?-?$|-[$€£]$", text[:first])
        if structure := kinds.structure(text[start:end]):
            return replace(answer, parts=structure[0], unit=structure[1])
        found = kinds.quantity(text, before.start() if before else first, end)
    if found and found.end >= end:
        return replace(answer, value=found.value, unit=found.unit)
    run = text[start:end]
    if not informative(run):
        return checked(answer)
    whole = read_whole(run.strip(), answer)
    if whole is None:
        raise UndecidableError("a part of it would be dropped")
    return whole


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Narrow a run to what operators and brackets that lead to nothing leave of it.

    A hyphen after a word and a bullet before a space are no signs; a power or product that a
    word is part of (``foo**9``) stays, and is no number.
    """
    tokens = list(TOKEN.finditer(text, start, end))
    excess = sum((t[0] in "([{") - (t[0] in ")]}") for t in tokens)
    bars = sum(t[0] == "|" for t in tokens)
    low, high = 0, len(tokens)
    while low < high:
        first, last = tokens[low], tokens[high - 1]
        closes = last[0] == "|" and bars % 2 == 0
        if last[0] in BINARY | {"(", "[", "{", "!", "_", ",", ";", ":", "|"} and not closes:
            gone, high = last, high - 1
        elif last[0] in ")]}" and excess < 0:
            gone, high = last, high - 1
        elif first[0] in (")", "]", "}", "=", "<", ">", "<=", ">=", ",", ";", ":", "+"):
            gone, low = first, low + 1
        elif first[0] in "([{" and excess > 0:
            gone, low = first, low + 1
        elif first[0] in ("-", "*", "**") and not is_sign(text, first, tokens[low + 1 : low + 2]):
            gone, low = first, low + 1
        else:
            break
        excess -= (gone[0] in "([{") - (gone[0] in ")]}")
        bars -= gone[0] == "|"
    return (tokens[low].start(), tokens[high - 1].end()) if low < high else (start, start)


def is_sign(text: str, first: re.Match[str], following: list[re.Match[str]]) -> bool:
    """Tell whether a leading operator belongs to the number behind it."""
    before = text[first.start() - 1] if first.start() else " "
    if first[0] != "-":
        return not before.isspace()
    gap = not following or following[0].start() > first.end()
    return not gap and not before.isalnum()


def runs(text: str, letters: int = 1) -> list[tuple[int, int]]:
    """Find the stretches of mathematics in prose: from and to, between words and sentence marks.

    Args:
        text: plain text.
        letters: the longest unknown word that may be a product of variables. It counts as
            mathematics where it touches a number or an operator.
    """
    tokens = list(TOKEN.finditer(text))
    found: list[list[int]] = [[]]
    depth = 0
    for index, token in enumerate(tokens):
        before = tokens[index - 1] if index else None
        after = tokens[index + 1] if index + 1 < len(tokens) else None
        depth = max(0, depth + (token[0] in "([{") - (token[0] in ")]}"))
        if token["junk"] or token["word"] and is_prose(token, before, after, letters):
            depth = 0
            found.append([])
            continue
        ends = token[0] in ",;:" and depth == 0 and not text[token.end() : token.end() + 1].strip()
        if ends or before and "\n" in text[before.end() : token.start()]:
            found.append([])
        if not ends:
            found[-1] += [token.start(), token.end()]
    return [(run[0], run[-1]) for run in found if run]


def is_prose(
    token: re.Match[str], before: re.Match[str] | None, after: re.Match[str] | None, letters: int
) -> bool:
    """Tell whether a word belongs to the sentence rather than to a formula."""
    word = token[0]
    if len(word) > 1 and word in WORDS_OF_FORMULAS - {"or", "and", "in"}:
        return False
    if len(word) > letters or not word.isascii():
        return True
    if before and before[0].lstrip("\\") in FUNCTIONS and len(word) == 1:
        return False
    if word in "xX" and before and after and before["number"] and after["number"]:
        return False
    for other, gap in (
        (before, token.start() - before.end() if before else 1),
        (after, after.start() - token.end() if after else 1),
    ):
        if other is None or other["junk"]:
            continue
        hyphen = other[0] == "-" and other is after and gap == 0
        if other[0] in BINARY and not hyphen:
            return False
        if gap == 0 and not other["word"] and other[0] not in "!,;:":
            return False
    return True
