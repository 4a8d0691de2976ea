"""Read examples to fit on: prompts with answers, whose answers are scored, or plain texts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vps import files
from vps.model.generation import encode
from vps.reading import read_text

STOP_SHARE = 0.25
HELD_OUT_SHARE = 0.25
LONGEST = 512  # tokens of an example, unless the caller says more
SHOWN = 3  # examples that a message names
KEYS = ("prompt", "answer", "gold", "text", "id")


@dataclass(frozen=True)
class Example:
    """Hold a prompt and the answer that is scored, or a text.

    Args:
        prompt: the prompt; ``None`` for a text.
        answer: the answer, or the text.
    """

    prompt: str | None
    answer: str

    @property
    def identity(self) -> str:
        """Return the sha256 by which overlap is found; outer white space does not count."""
        prompt = "" if self.prompt is None else self.prompt.strip()
        text = f"{'text' if self.prompt is None else 'pair'}\0{prompt}\0{self.answer.strip()}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Split:
    """Hold examples to take gradients of, to stop by, and to report on; none is in two of them."""

    fit: tuple[Example, ...]
    stop: tuple[Example, ...]
    held_out: tuple[Example, ...]

    @property
    def data(self) -> str:
        """Return sha256 over the examples used for fitting and stopping."""
        identities = sorted(each.identity for each in (*self.fit, *self.stop))
        return hashlib.sha256("\n".join(identities).encode()).hexdigest()


def parse(value: Any, name: str = "example", empty: bool = False) -> Example:
    """Make an example of a text, a pair, or a mapping.

    A mapping has ``prompt`` and ``answer`` (or ``gold``), or ``text``. With ``empty`` an example
    without text passes, which :func:`usable` leaves out.

    Raises:
        TypeError, ValueError: anything else; the message begins with ``name``.
    """
    if isinstance(value, Example):
        found = value
    elif isinstance(value, str):
        found = Example(None, value)
    elif isinstance(value, Mapping):
        unknown = [key for key in value if key not in KEYS]
        if unknown:
            raise ValueError(f"{name}: unknown key {unknown[0]!r}, expected of {', '.join(KEYS)}")
        answers = [key for key in ("answer", "gold") if key in value]
        if "text" in value and not answers and "prompt" not in value:
            found = Example(None, value["text"])
        elif "text" not in value and len(answers) == 1 and "prompt" in value:
            found = Example(value["prompt"], value[answers[0]])
        else:
            raise ValueError(
                f"{name}: expected 'prompt' and 'answer' (or 'gold'), or 'text' alone, "
                f"got {', '.join(map(repr, value)) or 'nothing'}"
            )
    elif isinstance(value, Sequence) and len(value) == 2:
        found = Example(*value)
    else:
        raise TypeError(f"{name}: expected a text, a pair or a mapping, got {type(value).__name__}")
    for part, text in (("prompt", found.prompt), ("answer", found.answer)):
        if text is None and part == "prompt":
            continue
        kind = "text" if found.prompt is None else part
        if not isinstance(text, str):
            raise TypeError(f"{name}: {kind} must be a string, got {type(text).__name__}")
        if not text.strip() and not empty:
            raise ValueError(f"{name}: {kind} is empty")
    return found


def parse_all(name: str, values: Sequence[Any]) -> list[Example]:
    """Parse examples that messages call by ``name`` and number; those without text pass."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise TypeError(
            f"calibrate: {name}s must be a list of texts, pairs or mappings, got "
            f"{type(values).__name__}"
        )
    return [parse(each, f"{name} {number}", empty=True) for number, each in enumerate(values, 1)]


def unrelated_texts() -> list[str]:
    """Return twelve texts that calibrations are not fitted on, to measure side effects by."""
    return read_text(Path(__file__).with_name("other_texts.txt")).splitlines()


def read_examples(path: Path) -> list[Example]:
    """Return the examples of a JSONL file, one a line; empty lines are skipped.

    Args:
        path: the file; rows are ``{"prompt", "answer"}`` or ``{"text"}``.

    Raises:
        OSError: the file cannot be read.
        TypeError, ValueError: a line that is no example; the message names file and line.
    """
    found = []
    for number, values in files.objects(path):
        found.append(parse(values, f"{path}, line {number}", empty=True))
    return found


def split(examples: Sequence[Example], held_out: Sequence[Example] | None, seed: int) -> Split:
    """Shuffle by ``seed`` and share out; equal examples count once.

    Args:
        examples: to fit and stop by and, where ``held_out`` is ``None``, to report on.
        held_out: to report on; empty for no report.
        seed: of the shuffle.

    Raises:
        ValueError: too few examples, or one of them among those held out.
    """
    unique = list({each.identity: each for each in examples}.values())
    random.Random(f"split:{seed}").shuffle(unique)
    least = 4 if held_out is None else 2
    if len(unique) < least:
        raise ValueError(
            f"calibrate: expected at least {least} different examples, got {len(unique)}"
        )
    apart = max(1, round(HELD_OUT_SHARE * len(unique))) if held_out is None else 0
    reported = unique[:apart] if held_out is None else held_out
    rest = unique[apart:]
    stops = max(1, round(STOP_SHARE * len(unique)))
    found = Split(
        tuple(rest[stops:]),
        tuple(rest[:stops]),
        tuple({each.identity: each for each in reported}.values()),
    )
    check_apart(found.held_out, [each.identity for each in (*found.fit, *found.stop)])
    return found


def check_apart(held_out: Sequence[Example], used: Sequence[str]) -> None:
    """Raise where an example to report on was used for fitting or stopping.

    Raises:
        ValueError: it says how many, and shows one.
    """
    taken = set(used)
    both = [each for each in held_out if each.identity in taken]
    if both:
        text = both[0].answer if both[0].prompt is None else both[0].prompt
        raise ValueError(
            f"calibrate: {len(both)} of {len(held_out)} held-out examples were used for fitting or "
            f"stopping, such as {text[:60]!r}; expected none"
        )


@dataclass(frozen=True)
class Encoded:
    """Hold token ids ``[1, T]``, of which the last ``scored`` are predicted."""

    ids: Tensor
    scored: int
    identity: str


def encoded(
    tokenizer: Any, example: Example, *, chat: bool, longest: int, device: Any = "cpu"
) -> Encoded:
    """Encode an example; a text is cut after ``longest`` tokens.

    A prompt is put as :func:`generation.encode` does; where it is no chat and neither side has
    a space between, one is put before the answer.

    Raises:
        ValueError: a pair of more than ``longest`` tokens, or nothing to predict.
    """
    if not example.answer.strip():
        raise ValueError(f"calibrate: {'text' if example.prompt is None else 'answer'} is empty")
    if example.prompt is None:
        ids = tokenizer(example.answer, return_tensors="pt")["input_ids"][:, :longest]
        scored = ids.shape[1] - 1
    else:
        prompt = encode(tokenizer, example.prompt, chat)["input_ids"]
        in_chat = chat and getattr(tokenizer, "chat_template", None)
        spaced = example.prompt[-1:].isspace() or example.answer[:1].isspace()
        between = "" if in_chat or spaced else " "
        answer = tokenizer(between + example.answer, return_tensors="pt", add_special_tokens=False)[
            "input_ids"
        ]
        ids = torch.cat([prompt, answer.to(prompt.dtype)], dim=1)
        scored = answer.shape[1]
        if ids.shape[1] > longest:
            raise ValueError(
                f"calibrate: example {example.prompt[:40]!r} has {ids.shape[1]} tokens, "
                f"expected at most {longest}"
            )
    if scored < 1:
        raise ValueError(f"calibrate: example {example.answer[:40]!r} has no token to predict")
    return Encoded(ids.to(device), scored, example.identity)


@dataclass(frozen=True)
class LeftOut:
    """Name an example that cannot be used: of what, its number there from 1, and why."""

    of: str
    number: int
    reason: str


def usable(
    tokenizer: Any,
    of: str,
    examples: Sequence[Example],
    *,
    chat: bool,
    longest: int = LONGEST,
    device: Any = "cpu",
) -> tuple[list[tuple[Example, Encoded]], list[LeftOut]]:
    """Return the examples that :func:`encoded` takes, with what it gives, and those it refuses.

    Args: as for :func:`encoded`, and ``of``, which names the examples in messages.

    Raises:
        ValueError: none of them can be used.
    """
    found, left_out = [], []
    for number, each in enumerate(examples, 1):
        try:
            code = encoded(tokenizer, each, chat=chat, longest=longest, device=device)
        except ValueError as error:
            left_out.append(LeftOut(of, number, str(error).removeprefix("calibrate: ")))
        else:
            found.append((each, code))
    if left_out and not found:
        raise ValueError(f"calibrate: {told(left_out, len(examples))}")
    return found, left_out


def told(left_out: Sequence[LeftOut], count: int) -> str:
    """Say how many of ``count`` examples cannot be used, and why the first of them cannot."""
    of = left_out[0].of
    return f"{len(left_out)} of {count} {of} cannot be used and are left out: {listed(left_out)}"


def listed(left_out: Sequence[LeftOut]) -> str:
    """List the first examples left out, each with its reason, and how many more there are."""
    shown = "; ".join(
        f"{each.of}, number {each.number}: {each.reason}" for each in left_out[:SHOWN]
    )
    return shown + (f"; and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else "")
