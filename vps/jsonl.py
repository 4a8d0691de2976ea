"""Files of one JSON object a line that survive being cut off: read whole lines, append durably."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class BrokenLineError(ValueError):
    """A line that is no JSON object has others after it, so it was not merely cut off."""


def parse_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, or ``None``."""
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def lines(path: Path) -> list[tuple[int, bytes]]:
    """Every line of a file that is not blank, and its number from 1.

    Raises:
        OSError: the file cannot be read.
    """
    every = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    return [(number, line) for number, line in enumerate(every, 1) if line.strip()]


def why_none(line: bytes) -> str:
    """Why :func:`parse_object` gives nothing for a line."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 text, at byte {error.start} of the line"
    return "not a JSON object"


def read_objects(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file in order, and the bytes they take; a cut last line is left out.

    Raises:
        BrokenLineError: a line before the last is no JSON object.
        OSError: the file cannot be read.
    """
    lines = path.read_bytes().split(b"\n")
    found: list[dict[str, Any]] = []
    end = 0
    for place, line in enumerate(lines, 1):
        values = parse_object(line)
        if values is None:
            if any(rest.strip() for rest in lines[place:]):
                raise BrokenLineError(f"{path}: line {place} is no JSON object")
            break
        found.append(values)
        end += len(line) + 1
    return found, end


def cut(path: Path, end: int) -> None:
    """Leave the first ``end`` bytes, and end the last line where only its end is missing."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.truncate(min(end, size))
        if end > size:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())


def append(path: Path, values: Mapping[str, Any]) -> None:
    """Add one line and wait until it is on the disk; on a failure nothing of it stays.

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
    """Write a whole file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
