"""Write files that survive a crash: a whole file at once, or one JSON object a line.

A reader of lines leaves out a last one that was cut off, and refuses whatever else is no row.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# What JSON text can end with when it is cut inside a value, from where its reader stops.
WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
NUMBER_OR_ESCAPE = r"\.|\.?\d*[eE][+-]?|\\?u?[0-9a-fA-F]{0,4}"


class BrokenLineError(ValueError):
    """A line is no JSON object, and no row that was merely cut off."""


def parse_object(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line, or ``None``."""
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def lines(path: Path) -> list[tuple[int, bytes]]:
    """Return every line of a file that is not blank, with its number from 1.

    Raises:
        OSError: the file cannot be read.
    """
    every = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [(number, line) for number, line in enumerate(every, 1) if line.strip()]


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the JSON object of every line that is not blank, with its number from 1.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no JSON object; the message names file and line.
    """
    for number, line in lines(path):
        values = parse_object(line)
        if values is None:
            raise ValueError(f"{path}, line {number}: {why_none(line)}")
        yield number, values


def why_none(line: bytes) -> str:
    """Say why :func:`parse_object` gives nothing for a line."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 text, at byte {error.start} of the line"
    return "not a JSON object"


def check_regular(path: Path) -> None:
    """Refuse a path that holds something other than a file: a folder, a pipe, a device.

    Raises:
        OSError: the message names it.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_objects(path: Path, beginning: str) -> tuple[list[dict[str, Any]], int]:
    """Read the objects of a file in order, with the bytes that they take.

    Blank lines are passed over, and a last line that was cut off is left out: one that begins as
    every row does, as far as it goes, and breaks off. Anything else belongs to somebody.

    Args:
        path: the file.
        beginning: text that every row begins with, such as ``{"row": 0, "id": ``; 0 stands for
            any number.

    Raises:
        BrokenLineError: a line is neither an object nor a row cut off at the end of the file.
        OSError: the file cannot be read.
    """
    check_regular(path)
    data = path.read_bytes()
    every = data.split(b"\n")
    found: list[dict[str, Any]] = []
    end = 0
    for place, line in enumerate(every, 1):
        own = line.removeprefix(codecs.BOM_UTF8) if place == 1 else line
        values = parse_object(own)
        if values is not None:
            found.append(values)
        elif own.strip():
            if any(rest.strip() for rest in every[place:]) or not _is_cut(own, beginning):
                raise BrokenLineError(f"{path}: line {place} is no JSON object")
            return found, end
        end += len(line) + 1
    return found, len(data) if not every[-1] else end


def _is_cut(line: bytes, beginning: str) -> bool:
    """Tell whether a line is a row without its end."""
    head = beginning.encode()
    alike = re.sub(rb'^(\{"\w+": )[0-9]+', rb"\g<1>0", line)
    if len(alike) < len(head):
        return head.startswith(alike.rstrip(b"\r"))
    if not alike.startswith(head):
        return False
    try:  # the cut may be inside a letter
        text = codecs.getincrementaldecoder("utf-8")().decode(line.rstrip(b"\r"))
        json.loads(text)
    except json.JSONDecodeError as error:
        rest = text[error.pos :]
        inside = any(word.startswith(rest) for word in WORDS)
        inside = inside or re.fullmatch(NUMBER_OR_ESCAPE, rest) is not None
        return error.msg.startswith("Unterminated") or (inside and error.msg != "Extra data")
    except (UnicodeDecodeError, RecursionError):
        pass
    return False


def cut(path: Path, end: int) -> None:
    """Cut a file to its first ``end`` bytes, and end its last line where that is all it lacks."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if end == size:
            return
        file.truncate(min(end, size))
        if end > size:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())


def append(path: Path, values: Mapping[str, Any]) -> None:
    """Add one line and wait until it is on the disk; a failure leaves nothing of it.

    Raises:
        OSError: it cannot be written, such as for a full disk; the message names the file.
    """
    text = json.dumps(values, ensure_ascii=False)
    line = memoryview(f"{text}\n".encode("utf-8", "backslashreplace"))
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        end = os.fstat(file).st_size
        try:
            while line:
                line = line[os.write(file, line) :]
            os.fsync(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(file, end)
            raise OSError(error.errno, f"{error.strerror}: a row was not written", str(path)) from (
                error
            )
    finally:
        os.close(file)


def replace(path: Path, text: str) -> None:
    """Write a whole file durably, so that a reader sees the old one or the new one, never a part.

    Raises:
        OSError: it cannot be written, or what is there is no file; the message names it.
    """
    check_regular(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}: not written", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
