"""Read single values that were typed, and say in one line why one cannot be used."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typer import BadParameter

from vps.config import VPSConfig, nearest_field
from vps.reading import parse_json, read_values

NAMES = r"[\w-]+(\.[\w-]+)*"  # a list of module names; anything else is a regular expression


class UsageError(Exception):
    """Say why the user's arguments cannot be used; exit code 2."""

    exit_code = 2


@contextmanager
def blaming(
    option: str,
    value: object = None,
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, RecursionError),
) -> Iterator[None]:
    """Turn what a library says against an option's value into a :class:`UsageError`.

    Args:
        option: named in the message.
        value: named too, where the library does not.
        kinds: of errors, which the value may cause.
    """
    try:
        yield
    except kinds as error:
        reason = str(error)
        if isinstance(error, RecursionError):
            reason = "nested too deeply"
        elif isinstance(error, OSError) and value is not None:
            reason = error.strerror or reason
        named = value is None or reason.startswith((f"{value}:", f"{value},"))
        where = option if named else f"{option} {value}"
        raise UsageError(f"{where}: {reason}") from error


def text_as_typed(text: str) -> str:
    """Return an argument as it was typed, also where the locale is ASCII."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that the locale has no letters for
        try:
            return os.fsencode(text).decode()
        except UnicodeDecodeError:
            raise BadParameter("not UTF-8 text") from None
    return text


def whole(text: str) -> int:
    """Read an integer; Typer's own reading of one does not say what came."""
    try:
        return int(text)
    except ValueError:
        raise BadParameter(f"{text!r} is not an integer") from None


def positive(text: str) -> int:
    """Read an integer above 0."""
    value = whole(text)
    if value < 1:
        raise BadParameter(f"{value} is not positive")
    return value


def names_of(option: str, text: str) -> list[str]:
    """Split names at their commas.

    Raises:
        UsageError: there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"{option} {text!r}: expected names, separated by commas; it names none")
    return names


def complete_field(incomplete: str) -> list[str]:
    """Return the settings that begin so, for a shell to complete."""
    return [f"{name}=" for name in VPSConfig.field_names() if name.startswith(incomplete)]


def complete_tasks(incomplete: str) -> list[str]:
    """Complete the last of several tasks by names of those that need no download."""
    from vps.evaluation.tasks import names

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in names() if name.startswith(last)]


def read_config(
    path: Path | None, settings: list[str], default: VPSConfig | None = None
) -> VPSConfig:
    """Return the config of a file, or ``default``, changed by ``FIELD=VALUE`` settings.

    Raises:
        UsageError: a missing or broken file, an unknown field or a bad value.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise UsageError(f"--set {setting}: expected FIELD=VALUE, such as gamma=0.1")
        if name not in VPSConfig.field_names():
            raise UsageError(f"--set {setting}: unknown field {name!r}{nearest_field(name)}")
        changes[name] = _value(name, text)
    for name in VPSConfig.ADAPTIVE:
        if name in changes:  # holds, whatever the file says
            changes.setdefault(f"adaptive_{name}", None)
    config = VPSConfig() if default is None else default
    if path is not None:
        with blaming("--config", path):
            config = _config_of(path)
    with blaming("--set"):
        return config.replace(**changes)


def _config_of(path: Path) -> VPSConfig:
    from vps.evaluation.grid import numbers

    values = read_values(path)
    if isinstance(values, dict):
        known = VPSConfig.field_names()
        values = {k: numbers(k, v) if k in known else v for k, v in values.items()}
    return VPSConfig.from_json(json.dumps(values, default=str))


def _value(name: str, text: str) -> Any:
    """Read ``text`` as field ``name`` takes it; VPSConfig refuses what does not fit."""
    kind = str(next(field.type for field in dataclasses.fields(VPSConfig) if field.name == name))
    word = text.strip().lower()
    of_names = "tuple[str" in kind
    if "None" in kind and word in ("null", "none"):
        return None
    try:
        if "bool" in kind:
            return {"true": True, "false": False}[word]
        if kind.startswith("float"):
            return float(word)
        if kind.startswith("tuple") and "str" not in kind and not word.startswith("["):
            return parse_json(f"[{text.strip().removeprefix('(').removesuffix(')')}]")
        value = parse_json(text)
    except (ValueError, KeyError):
        return _names(text) if of_names else text
    if not of_names or isinstance(value, (list, str)) or value is None:
        return value
    return _names(text)


def _names(text: str) -> str | list[str]:
    """Read names separated by commas; a text that holds more than names stays as it is."""
    word = text.strip()
    inner = word.strip("[]()") if "," in word or "'" in word else word
    names = [name for each in inner.split(",") if (name := each.strip().strip("'\"")) != ""]
    if not names or word == "all-linear" or not all(re.fullmatch(NAMES, name) for name in names):
        return text
    return names
