"""Turn "SPEC §4" into a link to the specification, and the notebook into a page."""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

SECTION = re.compile(r"SPEC §(\d+)")
ONE_OF_SEVERAL = re.compile(r"(SPEC §\d+(?:(?:, | and |–|–§)§?\d+)*)")
NOTEBOOK = "tour.ipynb"


def on_files(files: Any, config: Any) -> Any:
    """Add the notebook as a page of Markdown; the notebook itself stays beside it."""
    notebook = json.loads((Path(config.docs_dir) / NOTEBOOK).read_text())
    files.append(File.generated(config, "tour.md", content=markdown(notebook)))
    return files


def markdown(notebook: dict[str, Any]) -> str:
    """Return cells and their text outputs as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            text = output.get("text") or output.get("data", {}).get("text/plain", [])
            parts.append(f"```text\n{''.join(text).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Link each section of the specification that a page names."""
    target = files.get_file_from_path("specification.md")
    if page.file is target:
        return html
    anchors = dict(re.findall(r'id="((\d+)-[^"]+)"', target.page.content or ""))
    here = posixpath.relpath(target.url, posixpath.dirname(page.url) or ".")
    numbers = {number: anchor for anchor, number in anchors.items()}
    return SECTION.sub(lambda m: f'<a href="{here}#{numbers.get(m[1], "")}">{m[0]}</a>', html)
