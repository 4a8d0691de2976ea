r"""Hostile text made short and plain, and the part of it that holds the answer (SPEC §9).

Read are the last 4096 characters, in NFKC with ASCII digits and signs; of them the last
``\boxed{}``, else the last ``####``, else the last "answer is", else all.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal, NamedTuple

LIMIT = 4096
Source = Literal["boxed", "hashes", "phrase", "text"]

SUPERSCRIPT_RUN = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
SUBSCRIPT_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
VULGAR_FRACTION = re.compile("([¼-¾⅐-⅞↉])")
BOLD = re.compile(r"(?<![\w)\]}*])\*\*([^*\n]{1,200})\*\*(?![\w(*])")
FIRST_WORD = re.compile(r"[\w.,^*/+\-\\{}()\[\]]*")
COMMANDS = dict(
    zip("≠≈π∞√∈∪∩∅±", "neq approx pi infty sqrt in cup cap emptyset pm".split(), strict=True)
)
GREEK_LETTER = re.compile(r"(?<![^\W\d_])[αβγδεθλρστφψω](?![^\W\d_])")
CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−‒–‐‑﹣－", "-"),
        **dict.fromkeys("⁄∕÷", "/"),
        **dict.fromkeys("×·⋅∙∗", "*"),
        **{sign: rf" \{name} " for sign, name in COMMANDS.items()},
        **dict(zip("—`∶、º٫٬’", "  :,°.,'", strict=True)),
        "≤": "<=",
        "≥": ">=",
        "ℝ": r"\mathbb{R}",
    }
)

# LaTeX that says nothing about the value; `$` around mathematics goes, `$` of money stays.
DRESSING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d)(?:\{,\}|,\\[!,]\s?)(?=\d)", ","),
        (r"(?<=\d)\\,(?=\d{3})", ","),
        (r"\\!", ""),
        (r"\{([:;])\}", r"\1"),
        (r"\\\{\s{0,3}\\\}", r"\\emptyset "),
        (r"\^\s?\{?\s?(?:\\(?:text|mathrm|textrm)\s?\{)?\s?(st|nd|rd|th)\s?\}{0,2}", r"\1"),
        (r"(?<!\\)\\[,;: ]|~|\\(?:q?quad|therefore|implies|Rightarrow)(?![A-Za-z])", " "),
        (r"\\%", "%"),
        (r"\$\$|(?<!\\)\\[()\[\]]", " "),
        # No word of three letters, sign or space at the end: "$5 and $6" is money.
        (r"(?<!\\)\$((?:[^$\\\n]|\\.)*?[^\s$\\+*/,-])\$(?!\d)", None),
        (r"\\?\$(?=\s?-?[\d.])|(?<=\d)\s?\\?\$", "$"),
        (r"\\\$|\$(?!\s?-?[\d.])(?<!\d\$)", " "),
        (r"\\(?:boxed|fbox)(?![A-Za-z])", " "),
        (r"(?<!\\)\{\s{0,3}\}", " "),
        (r"\\(?:left|right)\.", ""),
        (r"\\(?:left|right|displaystyle|[bB]igg?[lr]?|bf|rm|it)(?![A-Za-z])", ""),
        (
            r"\\(?:text(?:normal|bf|it|rm|sf)?|math(?:rm|bf|it|sf)|operatorname|mbox|underline)"
            r"\s{0,3}\{((?:[^{}]|\{[^{}]*\})*)\}",
            r" \1 ",
        ),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (
            r"\\frac\s*(?:\{([^{}]*)\}|(\\[a-z]+|[A-Za-z]))\s*(\\[a-z]+|[A-Za-z\d])(?![A-Za-z])",
            r"\\frac{\1\2}{\3}",
        ),
        (r"_\s?\{\s*(\w+)\s*\}", r"_{\1}"),
        (r"\\(?:cdot|times|ast)(?![A-Za-z])", "*"),
        (r"\\geq?(?:slant)?(?![A-Za-z])", ">="),
        (r"\^\s{0,3}(?:\{\s{0,3}\\circ\s{0,3}\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])", "°"),
        (r"\\(?:vee|lor)(?![A-Za-z])", " or "),
        (r"\\not\s?=", r"\\neq "),
        (r"\\backslash(?![A-Za-z])", r"\\setminus "),
        (r"[ \t]{2,}", " "),
    )
]
# Rows of equations: one that begins with a sign goes on, others are a list.
ROWS = re.compile(
    r"\\(?:begin\{(?:align|aligned|gather|gathered|equation|split|cases)\*?\}"
    r"|left\s?\\\{\s?\\begin\{array\}\{[clr]+\})(.*?)\\end\{[a-z]+\*?\}",
    re.DOTALL,
)
ROW_END = re.compile(r"\\\\(?:\s|&|\[\d\w]{1,6}\])*(?P<sign>[=<>]|\\[lg]eq?|$)?")
DOUBLED = re.compile(r"\\(?=\\[A-Za-z])")
PROSE = re.compile(r"(?<![\\A-Za-z{])(?!and\b)[A-Za-z]{3,}")

BRACE = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{|\\.|[{}]", re.DOTALL)
NEGATED = re.compile(r"\bnot\s{0,3}\$?$", re.IGNORECASE)
BETWEEN_BOXES = re.compile(r"[\s$,;}]{0,9}(?:\\text\{)?\s{0,3}(?:and|or|,|;)?[\s$}]{0,9}")
HASHES = re.compile(r"#{4,}[ \t]*([^\n]*)")
HEADING = re.compile(r"(?:final |the )?(?:answer|solution|result|conclusion)s?\b\W*", re.IGNORECASE)
STEP = re.compile(r"(?:step|part|case)\b", re.IGNORECASE)
PHRASE = re.compile(
    r"\b(?:answer|(?:correct|right) (?:option|choice))\s{0,3}(?:is\b|was\b|equals\b|:|=)"
    r"(?!\s{0,3}not\b)[\s:]{0,9}",
    re.IGNORECASE,
)


class Cleaned(NamedTuple):
    """Text to search and whether its beginning was cut off."""

    text: str
    cut: bool


def clean(text: str) -> Cleaned:
    """Return the end of ``text`` in plain characters.

    Args:
        text: anything; only its last 4096 characters are read. A word that the cut went through
            is left out.

    Raises:
        TypeError: not a string.
    """
    if not isinstance(text, str):
        raise TypeError(f"vps.verify: text must be a str, got {type(text).__name__}")
    text = text.rstrip()
    cut = len(text) > LIMIT
    if cut:
        text = text[-LIMIT:]
        text = text[FIRST_WORD.match(text).end() :]  # type: ignore[union-attr]
    # Before NFKC, which makes 103 of 10³ and 31/2 of 3½.
    text = SUPERSCRIPT_RUN.sub(lambda run: f"^{{{unicodedata.normalize('NFKC', run[0])}}}", text)
    text = SUBSCRIPT_RUN.sub(lambda run: f"_{{{unicodedata.normalize('NFKC', run[0])}}}", text)
    text = VULGAR_FRACTION.sub(r" \1", text)
    # Before it, too: it makes a space and a combining mark of º and some signs.
    text = unicodedata.normalize("NFKC", text.translate(CHARACTERS)).translate(CHARACTERS)
    if len(text) > 2 * LIMIT:
        cut, text = True, text[-2 * LIMIT :]
    if not text.isascii():
        text = GREEK_LETTER.sub(greek, text)
        text = "".join(map(plain_character, text))
    else:
        text = re.sub(r"[\x00-\x08\x0e-\x1f\x7f]", " ", text)
    return Cleaned(BOLD.sub(r"\1", text).strip(), cut)


def greek(letter: re.Match[str]) -> str:
    """Return the command of a Greek letter that stands alone."""
    name = unicodedata.name(letter[0]).rpartition(" ")[2].lower()
    return rf"\{name.replace('lamda', 'lambda')} "


def plain_character(character: str) -> str:
    """Return an ASCII digit for any script's digit, and nothing for what has no width."""
    if character.isascii():
        return character if character.isprintable() or character in "\t\n\r\v\f" else " "
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category in ("Cf", "Mn", "Me"):
        return ""
    if category[0] == "C" or category[0] == "Z":
        return " "
    return character


def undressed(text: str) -> str:
    """Take spacing, delimiters and font commands out of ``text``.

    Fractions, roots, functions and Greek letters stay commands. A dollar sign stays where it
    says money.
    """
    if "\\" not in text and "$" not in text and "{" not in text:
        return text.replace("~", " ")
    if "\\begin" in text:
        text = ROWS.sub(
            lambda rows: ROW_END.sub(
                lambda row: ", " if row["sign"] is None else row["sign"], rows[1]
            ).replace("&", " "),
            text,
        )
    if "\\begin" not in text:
        text = DOUBLED.sub("", text)
    for pattern, replacement in DRESSING:
        text = pattern.sub(inline if replacement is None else replacement, text)
    return text


def inline(match: re.Match[str]) -> str:
    """Return what stands between two dollar signs without them, unless it is prose."""
    return match[0] if PROSE.search(match[1]) else f" {match[1]} "


def locate(text: str) -> tuple[Source, str]:
    """Find the part of a cleaned text that holds the answer, and what marks it."""
    boxed = last_boxes(text)
    if boxed:
        return "boxed", boxed
    region = after_hashes(text)
    if region:
        return "hashes", region
    phrases = list(PHRASE.finditer(text))
    if phrases:
        rest = text[phrases[-1].end() :]
        line = first_line(rest)
        if line:
            return ("text", rest.strip()) if derives(line) else ("phrase", line)
    return "text", text.strip()


def last_boxes(text: str) -> str:
    r"""Return the content of the last ``\boxed{}`` that is closed and not empty.

    Boxes with nothing but "and", "or" or a comma between them are one list.
    """
    opened: list[tuple[int, int] | None] = []
    closed: list[tuple[int, int, int]] = []
    for brace in BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(None)
        elif brace[0][0] == "\\" and brace[0][-1] == "{" and len(brace[0]) > 2:
            opened.append(brace.span())
        elif brace[0] == "}" and opened:
            span = opened.pop()
            negated = span and NEGATED.search(text, max(0, span[0] - 9), span[0])
            if span is not None and text[span[1] : brace.start()].strip() and not negated:
                closed.append((*span, brace.start()))
    if not closed:
        return ""
    chosen = [max(closed, key=lambda box: box[1])]
    for box in sorted(closed, reverse=True):
        between = text[box[2] + 1 : chosen[-1][0]]
        if box[2] < chosen[-1][0] and BETWEEN_BOXES.fullmatch(between):
            chosen.append(box)
    return ", ".join(dict.fromkeys(text[start:end].strip() for _, start, end in reversed(chosen)))


def after_hashes(text: str) -> str:
    """Return what the last ``####`` marks; a heading over a text or a step marks nothing."""
    marks = list(HASHES.finditer(text))
    for mark in reversed(marks):
        line, rest = mark[1].strip().strip("#").strip(), text[mark.end() :].strip()
        if HEADING.fullmatch(line) or not line:
            line = first_line(rest.lstrip("#"))
        elif rest and (STEP.match(line) or not re.search(r"[\d\\]", line)):
            continue
        if line:
            return first_line(line + "\n" + rest) if line.endswith(":") else line
    return ""


def first_line(text: str) -> str:
    """Return the first line that is not empty, or the next where that one ends in a colon."""
    lines = [line for line in text.lstrip().split("\n", 9)[:9] if line.strip()]
    if len(lines) > 1 and lines[0].rstrip().endswith(":"):
        return lines[1].strip()
    return lines[0].strip() if lines else ""


def derives(line: str) -> bool:
    """Tell whether a line leads to its answer: it begins with a word and has an equation."""
    return bool(re.match(r"[A-Za-z]{2,}", line)) and bool(re.search(r"=|\n", line))
