"""Hostile text made short and plain: the last 4096 characters, NFKC, ASCII digits and signs."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

LIMIT = 4096

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
SUPERSCRIPT_RUN = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
VULGAR_FRACTION = re.compile("([¼-¾⅐-⅞↉])")
BOLD = re.compile(r"(?<![\w)\]}*])\*\*([^*\n]{1,200})\*\*(?![\w(*])")
FIRST_WORD = re.compile(r"[\w.,^*/+\-\\{}()\[\]]*")
CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−‒–‐‑﹣－", "-"),
        "—": " ",
        "⁄": "/",
        "∕": "/",
        "÷": "/",
        "×": "*",
        "·": "*",
        "⋅": "*",
        "∙": "*",
        "∗": "*",
        "≤": "<=",
        "≥": ">=",
        "π": r" \pi ",
        "∞": r" \infty ",
        "√": r" \sqrt ",
        "º": "°",
        "`": " ",
        "٫": ".",
        "٬": ",",
        "’": "'",
    }
)


class Cleaned(NamedTuple):
    """Text to search and whether its beginning was cut off."""

    text: str
    cut: bool


def clean(text: str) -> Cleaned:
    """The end of ``text`` in plain characters.

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
    text = SUPERSCRIPT_RUN.sub(lambda run: "^{" + run[0].translate(SUPERSCRIPTS) + "}", text)
    text = VULGAR_FRACTION.sub(r" \1", text)
    # Before it, too: it makes a space and a combining mark of º and some signs.
    text = unicodedata.normalize("NFKC", text.translate(CHARACTERS)).translate(CHARACTERS)
    if len(text) > 2 * LIMIT:
        cut, text = True, text[-2 * LIMIT :]
    if not text.isascii():
        text = "".join(map(plain, text))
    else:
        text = re.sub(r"[\x00-\x08\x0e-\x1f\x7f]", " ", text)
    return Cleaned(BOLD.sub(r"\1", text).strip(), cut)


def plain(character: str) -> str:
    """One character: ASCII digit for any script's digit, nothing for what has no width."""
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
