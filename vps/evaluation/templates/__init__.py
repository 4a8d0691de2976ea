"""Fill the templates of tables and reports by jinja2, escaping values for HTML or Markdown.

``table.md`` is the state of a run, ``report.md`` and ``report.html`` what it found.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any


def render(name: str | Path, **values: Any) -> str:
    """Fill a template of this folder, or one elsewhere; a value that it asks for must be there."""
    path = Path(__file__).parent / name
    template = _environment(path.parent, path.suffix).get_template(path.name)
    return str(template.render(values))


@cache
def _environment(folder: Path, suffix: str) -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=suffix == ".html",
        finalize=_in_markdown if suffix == ".md" else None,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _in_markdown(value: object) -> str:
    """Escape text so that it stays in its place in Markdown and becomes no markup."""
    text = str(value)
    for mark in "\\|`*_<>[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
