"""The site builds without a warning and needs no network, neither to be built nor to be read."""

import html.parser
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from processes import ROOT

OWN = ROOT / ".cache/docs/bin/python"  # where make docs has installed mkdocs
LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src")}
# Proxies that nothing answers: whoever asks for a page on the network fails at once.
OFFLINE = dict.fromkeys(
    ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"
)


class Page(html.parser.HTMLParser):
    """What a page loads, links to, and can be linked at."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.ids, self.classes = set(), set(), set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if (tag, name) in LOADED:
                self.loads.add(value)
            elif (tag, name) == ("a", "href"):
                self.links.add(value)
            elif name in ("id", "name"):
                self.ids.add(value)
            elif name == "class":
                self.classes |= set((value or "").split())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site, and its pages by path."""
    interpreter = str(OWN) if OWN.exists() else sys.executable
    if not OWN.exists() and (find_spec("mkdocs") is None or find_spec("material") is None):
        pytest.skip("mkdocs-material is not installed: make docs")
    folder = tmp_path_factory.mktemp("site")
    command = [interpreter, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = os.environ | OFFLINE | {"NO_MKDOCS_2_WARNING": "1"}
    start = time.perf_counter()
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert run.returncode == 0 and not run.stderr, run.stdout + run.stderr
    assert seconds < 60, f"the build takes {seconds:.0f} s"
    return folder, {path: Page(path.read_text()) for path in folder.rglob("*.html")}


def test_pages_load_nothing_from_a_network(site):
    folder, pages = site
    assert len(pages) > 20
    for path, page in pages.items():
        for source in page.loads:
            parts = urlsplit(source)
            assert not parts.scheme and not parts.netloc, f"{path.name} loads {source}"
            if path.name != "404.html":  # whose paths begin at the root of a server
                assert (path.parent / unquote(parts.path)).resolve().is_file(), source
        assert "mermaid" not in page.classes, f"{path.name} would load mermaid from a CDN"
    for path in folder.rglob("*.css"):
        outside = re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)\"']+", path.read_text())
        assert not outside, f"{path.name} loads {outside}"


def test_links_lead_somewhere(site):
    folder, pages = site
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto"):
                continue
            found = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert found.is_relative_to(folder.resolve()) and found.is_file(), (
                f"{path.name}: {link}"
            )
            if parts.fragment and found.suffix == ".html":
                target = pages[Path(found)]
                assert unquote(parts.fragment) in target.ids, f"{path.name}: {link}"


def test_search_works_without_a_server(site):
    folder, _ = site
    assert "var __index" in (folder / "search/search_index.js").read_text()
    index = (folder / "index.html").read_text()
    assert "assets/iframe-worker.js" in index and "unpkg.com" not in index


def test_docstrings_are_links_and_no_markup_is_left(site):
    folder, pages = site
    for path in pages:
        text = re.sub(r"<[^>]+>", "", path.read_text())
        assert not re.search(r":(?:func|class|meth|data|mod):|(?:func|class|meth):\w", text), path
    model = (folder / "api/model.html").read_text()
    assert "specification.html#11-prompt-scope" in model and 'id="vps.patch"' in model
