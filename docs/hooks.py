"""What mkdocs is asked to do besides: a page made of the notebook, and links in docstrings."""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from markdown.extensions.toc import slugify
from mkdocs.structure.files import File

NOTEBOOK, SPECIFICATION = "tour.ipynb", "specification.md"
SECTION = re.compile(r"SPEC §(\d+)")
INTERVAL = re.compile(r"\d \[[+−]?\d+\.\d+, [+−]?\d+\.\d+\]|\d\.\d+ to \d+\.\d+")
ROLE = re.compile(r":(?:class|data|func|meth|mod):<code>~?([\w.]+)</code>")


def on_files(files: Any, config: Any) -> Any:
    """Add the notebook as a page of Markdown; the notebook itself stays beside it."""
    notebook = json.loads((Path(config.docs_dir) / NOTEBOOK).read_text())
    files.append(File.generated(config, "tour.md", content=markdown(notebook)))
    return files


def markdown(notebook: dict[str, Any]) -> str:
    """Return the cells and their text outputs as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            text = output.get("text") or output["data"]["text/plain"]
            parts.append(f"```text\n{''.join(text).rstrip()}\n```")
    parts.append(f"This page is the notebook [{NOTEBOOK}]({NOTEBOOK}) with its outputs.")
    return "\n\n".join(parts) + "\n"


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Link sections of the specification ("SPEC §4") and the roles of docstrings (``:func:``).

    An interval, ``1.10 [1.08, 1.11]``, is kept in one line.
    """
    html = re.sub(r"<td[^>]*>.*?</td>", _unbroken, ROLE.sub(_reference, html))
    specification = files.get_file_from_path(SPECIFICATION)
    if page.file is specification:
        return html
    headings = re.findall(r"^## ((\d+)\..*)$", specification.content_string, re.M)
    anchors = {number: slugify(heading, "-") for heading, number in headings}
    there = posixpath.relpath(specification.url, posixpath.dirname(page.url) or ".")
    return SECTION.sub(lambda m: f'<a href="{there}#{anchors[m[1]]}">{m[0]}</a>', html)


def _unbroken(cell: re.Match[str]) -> str:
    """Return a cell of a table with its intervals in one line."""
    return INTERVAL.sub(lambda m: m[0].replace(" ", "&nbsp;"), cell[0])


def _reference(match: re.Match[str]) -> str:
    """Return a link to a name of vps where the reference has it, else the name."""
    name = match[1] if match[1].startswith("vps.") else f"vps.{match[1]}"
    return f'<autoref optional identifier="{name}"><code>{match[1]}</code></autoref>'
