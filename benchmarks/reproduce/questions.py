"""Draw what the study asks: choice questions, problems to answer, and prose of other kinds.

Everything has fixed seeds and needs no network. The first ``PILOT`` questions of every kind were
used to choose kinds and sizes; the study shows one of them as an example and asks none.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import random
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from vps.evaluation.tasks import PROMPT, documents, near

KINDS = ("arithmetic", "chains", "units")
FACTORS = (
    ("metres", "kilometres", 1000), ("centimetres", "metres", 100), ("millimetres", "metres", 1000),
    ("millimetres", "centimetres", 10), ("grams", "kilograms", 1000), ("kilograms", "tonnes", 1000),
    ("milligrams", "grams", 1000), ("millilitres", "litres", 1000), ("seconds", "minutes", 60),
    ("minutes", "hours", 60), ("hours", "days", 24), ("days", "weeks", 7), ("months", "years", 12),
    ("years", "decades", 10), ("years", "centuries", 100), ("inches", "feet", 12),
    ("feet", "yards", 3), ("ounces", "pounds", 16), ("cents", "dollars", 100),
    ("quarters", "dollars", 4),
)  # fmt: skip
SEED = 20261129
PILOT = 150  # questions of each kind
CHOICES = 1000  # questions of each kind, the most that a part of the study asks
GENERATED = 200  # problems of arithmetic, behind those
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


def problems(count: int, *, pilot: bool = False) -> list[Document]:
    """Return the first problems of arithmetic to be answered as text, no choice questions.

    Those of the pilot are its choice questions.
    """
    _check(count, PILOT if pilot else GENERATED, "problems")
    start = 0 if pilot else PILOT + CHOICES
    return _drawn("arithmetic")[start : start + count]


def context(kind: str, document: Document) -> str:
    """Put a question as ``vps eval`` does, after one example of its kind."""
    example = _drawn(kind)[PILOT - 1]
    return f"{_put(example)} {example['answer']}\n\n{_put(document)}"


def _put(document: Document) -> str:
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


@cache
def _drawn(kind: str) -> list[Document]:
    count = PILOT + CHOICES + GENERATED
    if kind == "arithmetic":
        return documents(kind, count, SEED)
    generator = random.Random(f"{SEED}:{kind}")
    found: dict[str, Document] = {}
    for question, answer, wrong in _chains() if kind == "chains" else _units(generator):
        choices = [answer, *(wrong or near(answer, generator))]
        generator.shuffle(choices)
        document = {"question": question, "answer": answer, "choices": choices}
        found.setdefault(question, document | {"gold": choices.index(answer)})
        if len(found) == count:
            break
    return list(found.values())


def _chains() -> Iterable[tuple[str, str, list[str]]]:
    """Yield sums of three digits of reasoning-gym, in the words of its basic arithmetic."""
    import reasoning_gym

    settings = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    for entry in reasoning_gym.create_dataset("chain_sum", size=9000, seed=SEED, **settings):
        expression = entry["question"].rpartition(":")[2].strip(" =")
        yield f"Calculate {expression}.", entry["answer"], []


def _units(generator: random.Random) -> Iterable[tuple[str, str, list[str]]]:
    """Yield conversions, with what other factors would give."""
    factors = sorted({factor for _, _, factor in FACTORS})
    asked = [(unit, count) for unit in FACTORS for count in range(2, 100)]
    generator.shuffle(asked)
    for (small, large, factor), count in asked:
        others = generator.sample([each for each in factors if each != factor], 3)
        wrong = [str(count * other) for other in others]
        yield f"How many {small} are {count} {large}?", str(count * factor), wrong


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
