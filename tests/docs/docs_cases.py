"""Pages of the documentation, and the code blocks in them."""

import re
from typing import NamedTuple

from processes import ROOT

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
LOCAL = ".cache/smollm2"
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
    + [ROOT / "kernels/README.md", ROOT / "csrc/README.md", *(ROOT / "docs").rglob("*.md")]
)
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?```(?P<kind>\w*)\n(?P<code>.*?)```", re.S
)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


class Block(NamedTuple):
    """A code block of a page."""

    kind: str
    code: str
    reason: str | None  # why it is not run


def named(path):
    return str(path.relative_to(ROOT))


def blocks(path, kind):
    """The code blocks of a page, of one kind."""
    found = [Block(m["kind"], m["code"], m["reason"]) for m in FENCE.finditer(path.read_text())]
    return [block for block in found if block.kind == kind]


def python_pages():
    """The pages with Python to run; blocks of a page share their names."""
    return [path for path in PAGES if any(b.reason is None for b in blocks(path, "python"))]


def commands(path):
    """The commands that a page shows: lines of shell blocks, and inline code that begins as one."""
    text = path.read_text()
    lines = [line for b in blocks(path, "sh") for line in b.code.replace("\\\n", " ").splitlines()]
    if path.name == "README.md" and path.parent.name in ("benchmarks", "csrc"):
        lines += re.findall(r"^    ((?:make|python|pip|pytest) .*)$", text, re.M)
    starts = ("vps ", "make ", "pip install ", "python -m ", "torchrun ")
    lines += [code for code in INLINE.findall(FENCE.sub("", text)) if code.startswith(starts)]
    return [line.split("  #")[0].strip() for line in lines if line.strip()]
