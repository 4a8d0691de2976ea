"""LaTeX notation brought into the plain form that the tokenizer reads."""

from __future__ import annotations

import re

REPLACEMENTS = [
    (re.compile(r"(?<=\d)(?:\{,\}|,\\[!,])(?=\d)"), ","),
    (re.compile(r"(?<=\d)\\,(?=\d{3})"), ","),
    (re.compile(r"\\[,;:! ]|~|\\q?quad(?![A-Za-z])"), " "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"(?<=\w)\\?\$(?=\w)|\$\$"), " "),
    (re.compile(r"\\?[$€£¥]"), ""),
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])"), " "),
    (re.compile(r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z])"), ""),
    (
        re.compile(
            r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname|mbox)"
            r"\s{0,3}\{([^{}]*)\}"
        ),
        r" \1 ",
    ),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\leq?(?:slant)?(?![A-Za-z])"), "<="),
    (re.compile(r"\\geq?(?:slant)?(?![A-Za-z])"), ">="),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\^\s{0,3}(?:\{\s{0,3}\\circ\s{0,3}\}|\\circ(?![A-Za-z]))"), "°"),
    (re.compile(r"\\degree(?![A-Za-z])"), "°"),
    (re.compile(r"\\(?:mu|micro)(?=[A-Za-z])"), "μ"),
]


def plain(text: str) -> str:
    """``text`` with spacing, delimiters, currency signs and font commands taken out.

    Fractions, roots, functions and Greek letters stay commands: the parser knows them.
    """
    if "\\" not in text and "$" not in text and text.isascii() and "{" not in text:
        return text.replace("~", " ")
    for pattern, replacement in REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return text
