"""Commands, options, extras, links and names in README and documentation are there."""

import io
import re
import shlex
from contextlib import redirect_stdout
from functools import cache
from importlib.util import find_spec

import pytest
from docs_cases import FENCE, INLINE, PAGES, blocks, commands, named
from processes import ROOT

import vps
from vps import verify
from vps.cli import main

TARGETS = set(re.findall(r"^([a-z][a-z0-9.-]*):", (ROOT / "Makefile").read_text(), re.M))
SETUP = (ROOT / "setup.py").read_text()
EXTRAS = set(
    re.findall(r'^    "(\w+)": ', SETUP.partition("EXTRAS = {")[2].partition("\n}")[0], re.M)
)
EXTRAS |= {"test", "all"}
COMMANDS = ("generate", "refine", "calibrate", "eval", "ablate", "report", "demo", "doctor")
# Elsewhere, options are those of vLLM or of the programs of benchmarks.
WITH_OPTIONS = [path for path in PAGES if path.parent.name in ("docs", "guides", "api")]
WITH_OPTIONS = [path for path in WITH_OPTIONS if path.name != "vllm.md"] + [ROOT / "README.md"]

COMMENT = re.compile(r"<!--.*?-->", re.S)


@cache
def options(command):
    """The long options of a command, from its help."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main([command, "--help"] if command else ["--help"]) == 0
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", printed.getvalue()))


def given_options(words):
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def check_vps(words, line):
    command = words[0] if words else ""
    if command.isupper():  # a placeholder
        return
    if command.startswith("-"):
        assert given_options(words) <= options(""), line
        return
    assert command in COMMANDS, line
    assert given_options(words[1:]) <= options(command), line


def check_pip(words, line):
    for word in words:
        name, bracket, extras = word.partition("[")
        if bracket:
            assert set(extras.rstrip("]").split(",")) <= EXTRAS, line
        if name == "vps-kernels":  # which is on no index
            assert "--find-links" in words, line


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_commands_exist(path):
    for line in commands(path):
        words = shlex.split(line.replace("…", ""), comments=True)
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        if not words:
            continue
        if "-m" in words and "vps.cli" in words:
            words = ["vps", *words[words.index("vps.cli") + 1 :]]
        if words[:2] == ["python", "-m"]:
            module = words[2]
            assert module.startswith("vllm") or find_spec(module) is not None, line
        elif words[0] == "vps":
            check_vps(words[1:], line)
        elif words[0] == "make":
            assert words[1].isupper() or words[1].startswith(".") or words[1] in TARGETS, line
        elif words[:2] == ["pip", "install"]:
            check_pip(words[2:], line)


@pytest.mark.parametrize("path", WITH_OPTIONS, ids=named)
def test_options_exist(path):
    known = set().union(*map(options, COMMANDS)) | {"--no-build-isolation"}
    for code in INLINE.findall(FENCE.sub("", path.read_text())):
        if code.startswith("--"):
            assert given_options(code.split()) <= known, code


def test_every_extra_is_described():
    text = (ROOT / "docs/index.md").read_text()
    assert set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`\w.*?) \|", text, re.M)))) == (
        EXTRAS - {"all"}
    )


def slug(heading):
    """The anchor of a heading, as GitHub and mkdocs make it."""
    plain = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower()
    return re.sub(r"[-\s]+", "-", plain)


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_to_files_and_headings(path):
    text = COMMENT.sub("", FENCE.sub("", path.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name).resolve() if name else path
        if found.name == "tour.md":  # made of the notebook
            found = found.with_suffix(".ipynb")
        assert found.is_file() and found.is_relative_to(ROOT), target
        if anchor:
            page = found.read_text()
            snippet = re.fullmatch(r'--8<-- "(.+)"\s*', page)
            page = (ROOT / snippet[1]).read_text() if snippet else page
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page), re.M)
            assert anchor in {slug(heading) for heading in headings}, target


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_paths_exist(path):
    """Files and folders of the repository that inline code names by their path."""
    folders = ("vps", "tests", "benchmarks", "kernels", "csrc", "docs", ".ci")
    for code in INLINE.findall(FENCE.sub("", path.read_text())):
        if code.startswith(tuple(f"{folder}/" for folder in folders)) and " " not in code:
            built = re.search(r"[<*]|_cpp\.abi3\.so|_cuda\.so", code)
            assert built or (ROOT / code).exists(), code


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    listed = set(re.findall(r"^::: ([\w.]+)$", pages, re.M))
    last = {name.rpartition(".")[2] for name in listed}
    public = {*vps.__all__, *verify.__all__} - {"__version__", "reference", "DEFAULT_WEIGHTS"}
    assert public <= last, public - last


def test_the_install_lines_are_the_same_everywhere():
    first = [blocks(ROOT / name, "sh")[0].code for name in ("README.md", "docs/index.md")]
    lines = [[line.split("  #")[0].strip() for line in code.splitlines()] for code in first]
    assert lines[0] == lines[1] and lines[0][0].startswith("pip install torch")
