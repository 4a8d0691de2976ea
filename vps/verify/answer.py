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
MAX_CALLS = 9
MAX_STRETCHES = 12
GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau "
    "phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega"
).split()
FUNCTIONS = (
    "sin cos tan cot sec csc sinh cosh tanh asin acos atan arcsin arccos arctan exp log ln sqrt abs"
).split()
KNOWN = "|".join([*GREEK, *FUNCTIONS, "pi", "infinity", "mod"])
OPERATOR = r"[-+*/^=<>]"
SIGN = rf"{OPERATOR}|_|\w\(|\|.*\||\b[a-z]!"
WORD = r"(?<!\\)\b[^\W\d_]{3,}"
# What mathematics is made of: known words, commands, numbers, signs, letters that stand alone.
PIECE = (
    rf"(?:{LITERAL}|\\[A-Za-z]+[ \t]*|\\[{{}}|]|(?<![^\W\d_])(?:(?:{KNOWN})(?![^\W\d_])[ \t]*"
    r"|[A-Za-z](?![^\W\d_]|'[a-z]))"
    r"|!=|[-+*/^()\[\]{}=<>!_|°]|[,;:](?=\S|\s[^()\[\]{}\n]{0,60}[)\]}]))"
)
# A number ends what stands before it, but for "1 3/4": "5 5" and "3 m 4 m" are rows.
JOINT = r"(?:[ \t]*(?![ \t\d.])|(?<![A-Za-z\d.])[ \t]*|(?=\S)|(?<=\d)[ \t]+(?=\d{1,9}/\d))"
STRETCH = re.compile(rf"{PIECE}(?:{JOINT}{PIECE})*")
# Two or three letters that touch a number or an operator are a product of variables.
PRODUCT = re.compile(
    rf"(?:(?<={OPERATOR})\s?|(?<=[\d)}}\]({{]))(?!(?:nan|inf|oo)\b)[A-Za-z]{{2,3}}(?![A-Za-z])"
    rf"|(?<![A-Za-z\\])(?!(?:nan|inf|oo)\b)[A-Za-z]{{2,3}}(?=\s?{OPERATOR}|[\d({{_])"
)
JOINED = re.compile(
    rf"(?<![A-Za-z\\])(?:{KNOWN}|or|and|in)(?![A-Za-z])|\\(?:begin|end)\{{[a-z]+\}}(?:\{{[clr|]+\}})?|\\[A-Za-z]+"
)
FOREIGN = re.compile(r"[^\W\d_]{2,}|[^\x00-\x7fα-ωΑ-Ω°]|[^\w\s°'&\\+*/^()\[\]{}=<>!|,;:.-]")
# A letter that is a word: "a 4", "5 I".
LETTERS_FIRST = re.compile(rf"(?:[A-Za-z][ \t]+)+(?!{OPERATOR}|[A-Za-z\\(])")
LETTERS_LAST = re.compile(rf"(?<!{OPERATOR})(?:(?<=[\d)}}\],;:!])[ \t]+[A-Za-z])+$")
LEADING = re.compile(r"(?:[)\]}=<>,;:+!\s°'&]|[-*]+(?=[-*]*\s))+")
TRAILING = re.compile(r"(?:[-+*/^=<>(\[{!_,;:\s'&]|\\(?=$))+$")
# Two numbers in a row, a base, a division by zero, a comment: no formula.
BROKEN = re.compile(
    rf"(?<![_^\d.,])(?>{LITERAL})(?:\s+\d|\.\d|_)|(?<![A-Za-z\\])[A-Za-z]\s+\d|\d[eE]\d|\d'"
    r"|[,;]\s{0,3}[,;]|%|^\s*[,;/^!]|/\s?0(?![.\d])"
)
POWER = r"(?:\^|\*\*)[({\s]{0,4}-?"
HUGE = re.compile(
    rf"(?<!\}}){POWER}(?:\d{{5,}}|\d{{2,}}[)}}\s]{{0,4}}{POWER}\d|\d[)}}\s]{{0,4}}{POWER}\d+[)}}\s]{{0,4}}{POWER}\d)"
)
# What stands before the value in "x = 5", "f(2) ≈ 5", "3 + 4 = 7".
NAME = re.compile(
    r"(?:\\(?:det|angle|triangle|vec|bar|hat|overline)\s?)?[{|]{0,2}(?:[A-Za-z]{1,3}|\\[A-Za-z]+)"
    r"[}|]{0,2}(?:_\{?\w{1,8}\}?)?'?(?:\((?:[^()=]|[<>]=|\([^()=]{1,9}\)){1,24}\))?"
)
EQUALS = re.compile(r"(?<![<>!:=])(?::?=|\\approx(?![A-Za-z])|≈)")
# The rounded value behind an exact one: "5/3 ≈ 1.67" is 5/3, "x ≈ 11" is 11.
APPROXIMATED = re.compile(rf"(?<=[\d)}}!%])\s{{0,3}}(?:\\approx(?![A-Za-z])|≈)\s{{0,3}}-?{LITERAL}")
LETTER = re.compile(r"[(\[]?\s?([A-Za-z])(?:\s?,\s?[A-Za-z]){0,9}\s?[)\]]?")
INLINE = re.compile(
    r"\$\$[^$]{1,400}\$\$|\$[^$\n]{1,400}\$|\\\((?:[^\\\n]|\\[^)\n]){1,400}\\\)"
    r"|\\\[(?:[^\\]|\\[^\]]){1,400}\\\]"
)
JOINT_OF_FORMULAS = re.compile(r"[\s,;]{0,3}(?:and|or)?\s{0,3}")
LIST_BEFORE = re.compile(
    r"(?:(?:[\d%°],?[^\S\n]{0,3}(?:-|to|or|and|through|;)|\bbetween\b[^.\n]{1,40}\band"
    r"|\bfrom\b[^.\n]{1,40}\bto)[^\S\n]{0,3}|\d[:/]|\d[^\S\n]?[^\W\d_]{0,3}[^\S\n]by[^\S\n])[$€£]?$"
)


@dataclass(frozen=True, slots=True)
class Answer:
    r"""What a text answers.

    Attributes:
        text: the marked part, or the whole text.
        source: where it was found.
        value: the number, exact; of "x = 5" the 5. ``None`` for several numbers.
        unit: names of pint, or money, with their exponents, where a known unit is named.
        parts: what another plain answer may be, each with its numbers: ``("ratio", 3/2, 1)``,
            and ``time``, ``date``, ``range`` alike.
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
    """Return the answer that ``text`` gives; ``None`` for a text without any word or number.

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
    region = APPROXIMATED.sub("", region)
    text = undressed(region).strip().rstrip(".,;:? \t\n")
    if source == "phrase":
        text = re.split(r"\s(?:because|since)\b", text)[0].rstrip("!.,;:? ")
    aside = re.fullmatch(r"([^()]{0,80}\S)\s\([^()\\]{0,99}[A-Za-z]{3}[^()\\]{0,99}\)", text)
    whole = read_whole(aside[1] if aside else text, answer)
    if whole is not None:
        return whole
    contents = [text] if source == "boxed" else []
    formulas = inline_formulas(region, first=source in ("phrase", "hashes"))
    if formulas and not LIST_BEFORE.search(region[: formulas[0].start()].replace("$", " ")):
        contents = [undressed(found[0]).strip() for found in formulas]
        whole = read_whole(", ".join(contents), answer)
        if whole is not None and not whole.says_words:
            return whole
    if any(re.search(r"\d", part) and not re.search(WORD, part) for part in contents):
        raise UndecidableError("a part of it would be dropped")
    return read_prose(text, answer)


def inline_formulas(region: str, first: bool) -> list[re.Match[str]]:
    """Find the LaTeX that a region begins or ends with: one, or several joined by "and"."""
    chosen: list[re.Match[str]] = []
    found = list(INLINE.finditer(region))
    for match in found[:10] if first else found[:-11:-1]:
        edges = (chosen[-1].end() if chosen else 0, match.start())
        if not first:
            edges = (match.end(), chosen[-1].start() if chosen else len(region))
        gap = region[slice(*edges)]
        if not (JOINT_OF_FORMULAS.fullmatch(gap) if chosen else re.fullmatch(r"\W*", gap)):
            break
        chosen.append(match)
    return chosen if first else chosen[::-1]


def read_whole(text: str, answer: Answer) -> Answer | None:
    """Read a text of which every part counts; ``None`` where it is prose."""
    about = kinds.ABOUT.match(text)
    text = text[about.end() :] if about else text
    bullet = re.match(r"[-*+]\s+(?=[\d$.])|[,;:]\s*|\(?[a-h]\)\s+(?=\S)", text)
    text = text[bullet.end() :] if bullet else text
    if re.fullmatch(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?", text):
        text = text.replace(" ", "")
    if structure := kinds.structure(text):
        return replace(answer, parts=structure[0], unit=structure[1])
    if re.fullmatch(r"-?(?:\d+,\d\d?|0,\d+)", text):  # a list, or a decimal beside a number
        return replace(answer, value=Fraction(text.replace(",", ".")), formula=text)
    digits = kinds.based(text)
    if digits is not None:
        return replace(answer, value=digits)
    found = read_quantity(text)
    if found:
        return replace(answer, value=found.value, unit=found.unit)
    sides = EQUALS.split(text)
    if len(sides) > 1 and not any(re.search(r"[,;]|\b(?:or|and)\b", side) for side in sides[1:-1]):
        last = read_quantity(sides[-1].strip())
        named = NAME.fullmatch(sides[0].strip())
        values = {arithmetic.evaluate(side) for side in sides[bool(named) : -1]}
        if last and values - {None, last.value}:
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
    if tail and found and found.end == len(text) and is_formula(head):
        constant = not re.search(r"(?<![\\A-Za-z])[A-Za-z]|\\(?:sin|cos|tan)|°", head)
        metres = tail[1] == "m" and head[-1].isspace() and "\\" in head
        if len(tail[1]) > 1 or constant and (metres or tail[1] in "°%"):
            return replace(answer, formula=head.strip(), unit=found.unit)
    if is_formula(text):
        return replace(answer, formula=text)
    return None


def is_formula(text: str) -> bool:
    """Tell whether a text has no word but those of formulas; three letters may be a product."""
    if BROKEN.search(text) or re.search(rf"{OPERATOR}\s*$", text) or excess(text):
        return False
    if "\\int" in text or re.search(r"\\frac\s?\{d", text):
        text = re.sub(r"\bd[a-z]\b", " ", text)
    if FOREIGN.search(PRODUCT.sub(" ", JOINED.sub(" ", text))):
        return False
    return informative(text) or bool(LETTER.fullmatch(text))


def excess(text: str) -> int:
    """Count the brackets that are open at the end of a text."""
    return sum(text.count(bracket) for bracket in "([{") - sum(map(text.count, ")]}"))


def informative(text: str) -> bool:
    """Tell whether a text says something: a number, a command, or an operator by a symbol."""
    signs = OPERATOR if text.count("(") >= MAX_CALLS else SIGN
    symbol = re.search(r"[^\W_]", text) and re.search(signs, text)
    return bool(symbol or re.search(r"\d|\\[A-Za-z]|\binfinity\b", text))


def read_prose(text: str, answer: Answer) -> Answer:
    """Read what the last number or formula of a text ends, or the first behind a mark begins."""
    lines = text.split("\n")
    for line in lines if answer.source != "text" else reversed(lines):
        found = stretches(line)
        if found and answer.source != "text":
            return read_stretch(line, *found[0], answer)
        if len(found) > arithmetic.MAX_TOKENS and not re.search(r"[^\W\d_]{2}", line):
            raise UndecidableError("a row too long")
        for start, _ in found[-MAX_STRETCHES:]:
            if not LIST_BEFORE.search(line, max(0, start - 60), start):
                with suppress(UndecidableError):
                    return read_stretch(line, start, found[-1][1], answer)
        if found:
            raise UndecidableError("a part of it would be dropped")
    # LaTeX that says more than words
    return replace(answer, undecidable="\\" in undressed(answer.text))


def read_stretch(text: str, start: int, end: int, answer: Answer) -> Answer:
    """Read a stretch of mathematics: a number with the units behind it, or a formula."""
    if structure := kinds.structure(text[start:end]):
        after = kinds.unit_at(text, end)
        return replace(answer, parts=structure[0], unit=after.unit if after else structure[1])
    equations = re.search(r"[,;]\s|\b(?:and|or)\b", text[start:end].partition("=")[2])
    if not equations and not re.search(r"(?<![<>])[<>]", text[start:end]):
        first = max((side.end() for side in EQUALS.finditer(text, start, end)), default=start)
        first += len(text[first:]) - len(text[first:].lstrip())
        before = re.search(r"(?:US)?[$€£¥₹₽₩]\s?-?$|-[$€£]$", text[:first])
        first = before.start() if before else first
        found = kinds.compound(text, first) or kinds.quantity(text, first, end)
        if found and found.end >= end:
            return replace(answer, value=found.value, unit=found.unit)
    whole = read_whole(text[start:end], answer)
    if whole is None:
        raise UndecidableError("a part of it would be dropped")
    return whole


def stretches(text: str) -> list[tuple[int, int]]:
    """Find from where to where mathematics stands in a line, without what leads to nothing."""
    found = [trimmed(text, *match.span()) for match in STRETCH.finditer(text)]
    return [(start, end) for start, end in found if informative(text[start:end])]


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Narrow a stretch by operators, brackets and letters that lead to nothing.

    A hyphen after a word and a bullet before a space are no signs.
    """
    for _ in range(9):
        before = start, end
        last = TRAILING.search(text, start, end)
        end = last.start() if last else end
        letter = LETTERS_LAST.search(text, start, end)
        end = letter.start() if letter else end
        for pattern in (LEADING, LETTERS_FIRST):
            first = pattern.match(text, start, end)
            start = first.end() if first else start
        if text[start:end].startswith("-") and text[start - 1 : start].isalnum():
            start += 1
        left = excess(text[start:end])
        opening = re.compile(r"[(\[{\s]+").match(text, start, end)
        closing = re.compile(r"[)\]}]+$").search(text, max(start, end - abs(left)), end)
        start += min(left, opening.end() - start) if opening and left > 0 else 0
        end = max(end + left, closing.start()) if closing and left < 0 else end
        if (start, end) == before:
            break
    return start, max(start, end)
