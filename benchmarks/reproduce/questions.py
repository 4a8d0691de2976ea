"""Draw what the study asks: choice questions, problems to answer, and prose of other kinds.

Everything has fixed seeds and needs no network. The first ``PILOT`` questions of every kind were
used to choose the sizes; the study never asks them.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from vps.evaluation.tasks import PROMPT, documents

KINDS = ("arithmetic", "chains", "units")
SEED = 20261129
PILOT = 150  # questions of each kind
CHOICES = 1000  # questions of each kind, the most that a part of the study asks
GENERATED = 100  # problems of each kind, behind those
PROSE = ("reference", "docstrings", "abstracts", "licences")
SHORTEST = 400  # characters of a paragraph
DOCUMENTED = (
    "argparse", "asyncio.events", "ast", "bisect", "calendar", "codecs", "collections", "csv",
    "datetime", "decimal", "difflib", "doctest", "email.message", "fractions", "functools", "heapq",
    "imaplib", "inspect", "itertools", "json", "locale", "logging", "mailbox", "optparse", "os",
    "pickle", "pickletools", "random", "re", "sched", "shutil", "smtplib", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "turtle",
    "typing", "unittest.case", "unittest.mock", "urllib.request", "uuid", "weakref", "zipfile",
)  # fmt: skip

Document = dict[str, Any]


def questions(kind: str, count: int, *, pilot: bool = False) -> list[Document]:
    """Return the first choice questions of a kind, of the study or of its pilot.

    Args:
        kind: one of :data:`KINDS`.
        count: at most ``CHOICES``, or ``PILOT``.
        pilot: draw those that the study leaves out.
    """
    start, most = (0, PILOT) if pilot else (PILOT, CHOICES)
    _check(count, most, "questions")
    return _drawn(kind)[start : start + count]


def problems(kind: str, count: int, *, pilot: bool = False) -> list[Document]:
    """Return the first problems of a kind to be answered in text, which are no choice questions.

    Those of the pilot are its choice questions.
    """
    _check(count, PILOT if pilot else GENERATED, "problems")
    start = 0 if pilot else PILOT + CHOICES
    return _drawn(kind)[start : start + count]


def context(document: Document) -> str:
    """Put a question as ``vps eval`` does."""
    return PROMPT.replace("{{question}}", document["question"])


def prose(kind: str, count: int, tokenizer: Any, length: int) -> list[list[int]]:
    """Return the first ``length`` tokens of ``count`` paragraphs of a kind.

    Args:
        kind: ``"reference"``, the language reference that CPython carries; ``"docstrings"`` of its
            library; ``"abstracts"`` of the papers that lm-eval's READMEs quote; ``"licences"`` of
            this package, CPython and torch.
        count: paragraphs.
        tokenizer: of the model.
        length: tokens of each.

    Raises:
        ValueError: fewer paragraphs of that length.
    """
    found = []
    for paragraph in _paragraphs(_SOURCES[kind]()):
        ids = tokenizer(paragraph, add_special_tokens=False)["input_ids"]
        if len(ids) >= length:
            found.append(ids[:length])
        if len(found) == count:
            return found
    raise ValueError(f"prose: {kind} has {len(found)} paragraphs of {length} tokens, got {count}")


def digest(values: Any) -> str:
    """Tell apart what was asked, in twelve hexadecimal digits."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def _drawn(kind: str) -> list[Document]:
    if kind not in _DRAWN:
        _DRAWN[kind] = documents(kind, PILOT + CHOICES + GENERATED, SEED)
    return _DRAWN[kind]


_DRAWN: dict[str, list[Document]] = {}


def _check(count: int, most: int, name: str) -> None:
    if not 1 <= count <= most:
        raise ValueError(f"{name}: count must be 1 to {most}, got {count}")


def _paragraphs(texts: Iterable[str]) -> list[str]:
    """Return different ASCII paragraphs that begin with a capital, in an order of their own."""
    pieces = (" ".join(piece.split()) for text in texts for piece in text.split("\n\n"))
    whole = dict.fromkeys(
        piece
        for piece in pieces
        if len(piece) >= SHORTEST and piece.isascii() and piece[0].isupper()
    )
    order = sorted(whole)
    random.Random(SEED).shuffle(order)
    return order


def _reference() -> Iterable[str]:
    return (topics[name] for name in sorted(topics))


def _docstrings() -> Iterable[str]:
    for name in DOCUMENTED:
        module = importlib.import_module(name)
        members = [module, *(own for _, own in inspect.getmembers(module))]
        for own in list(members):
            if inspect.isclass(own):
                members += [each for _, each in inspect.getmembers(own)]
        for own in members:
            if getattr(own, "__module__", name) == name:
                yield inspect.getdoc(own) or ""


def _abstracts() -> Iterable[str]:
    return _packaged("lm_eval", lambda path: path.name == "README.md")


def _licences() -> Iterable[str]:
    own = Path(__file__).parents[2] / "LICENSE"
    python = Path(inspect.__file__).parent / "LICENSE.txt"
    yield from (path.read_text() for path in (own, python) if path.exists())
    yield from _packaged("torch", lambda path: path.name == "LICENSE")


def _packaged(package: str, wanted: Any) -> Sequence[str]:
    paths = importlib.metadata.files(package) or []
    return [Path(str(path.locate())).read_text() for path in sorted(paths) if wanted(path)]


_SOURCES = {
    "reference": _reference,
    "docstrings": _docstrings,
    "abstracts": _abstracts,
    "licences": _licences,
}
