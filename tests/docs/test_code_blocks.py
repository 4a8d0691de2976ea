"""Code in README and documentation runs as it stands, on a tiny model in place of the one it names.

The hub id of SmolLM2 and the folder of its local copy are replaced by the folder of a tiny random
model whose words are numbers, so nothing is downloaded. Everything else of a block is run.
"""

import io
import json
from contextlib import redirect_stdout

import pytest
from docs_cases import HUB, LOCAL, PAGES, blocks, named, python_pages
from processes import ROOT
from tiny import number_tokenizer, tiny

from vps.backends import dispatch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with as many blocks as the pages name."""
    import torch

    path = tmp_path_factory.mktemp("model")
    number_tokenizer().save_pretrained(path)
    sizes = dict(num_hidden_layers=23, max_position_embeddings=512)
    tiny(dtype=torch.float32, times=2, **sizes).save_pretrained(path)
    return path


@pytest.fixture
def registered():
    """Takes out the backends that a page registers."""
    before = dict(dispatch.BACKENDS)
    yield
    dispatch.BACKENDS.clear()
    dispatch.BACKENDS.update(before)
    dispatch._reasons.cache_clear()


def run(codes, namespace=None):
    """Run blocks one after the other in one namespace; return what they print."""
    namespace = {"__name__": "__main__"} if namespace is None else namespace
    printed = io.StringIO()
    with redirect_stdout(printed):
        for number, code in enumerate(codes, 1):
            exec(compile(code, f"<block {number}>", "exec"), namespace)
    return printed.getvalue()


@pytest.mark.parametrize("path", python_pages(), ids=named)
def test_python_blocks_run(path, folder, tmp_path, monkeypatch, registered):
    monkeypatch.chdir(tmp_path)
    codes = [block.code for block in blocks(path, "python") if block.reason is None]
    local = [code.replace(HUB, str(folder)).replace(LOCAL, str(folder)) for code in codes]
    if path.name == "README.md":
        assert len(codes) == 1 and len(codes[0].splitlines()) <= 12
        assert local != codes
    printed = run(local)
    if path.name == "README.md":
        report, sharpened, plain = printed.splitlines()
        assert report.startswith("161 layers sharpened")
        assert sharpened.startswith("17 <unk> 25 <unk>") and plain.startswith("17 <unk> 25 <unk>")


def test_what_is_not_run_says_why():
    left = [(path, b) for path in PAGES for b in blocks(path, "python") if b.reason]
    assert [named(path) for path, _ in left] == ["docs/guides/engines.md"]
    for path, block in left:
        compile(block.code, named(path), "exec")


def test_the_notebook_runs_and_its_outputs_are_of_its_code(tmp_path, monkeypatch):
    """On the tiny model that it makes where there is none; the outputs that are kept are SmolLM2's.

    The cells run without Jupyter: a client and a kernel would be 88 MB for these few lines.
    """
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs/tour.ipynb").read_text())["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in codes] == list(range(1, len(codes) + 1))
    namespace = {"__name__": "__main__"}
    for cell in codes:
        kept = "".join("".join(output["text"]) for output in cell["outputs"])
        now = run(["".join(cell["source"])], namespace)
        assert bool(now) == bool(kept)
    assert "21,664 parameters" not in json.dumps(cells) and now == kept == "True\n"
