"""What an interrupted calibration leaves, so that the same call goes on from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vps import jsonl
from vps.reading import parse_json, read_text


def left(path: Path) -> dict[str, Any] | None:
    """What an interrupted call left in a file: its key and its states; ``None`` without a file.

    Raises:
        ValueError: the file holds something else, or is none.
    """
    if not path.exists():
        return None
    try:
        jsonl.check_regular(path)
        values = parse_json(read_text(path))
        if set(values) == {"key", "states"} and all(isinstance(values[n], dict) for n in values):
            return dict(values)
    except (OSError, ValueError, TypeError):
        pass
    raise ValueError(
        f"calibrate: {path} holds no interrupted calibration; expected one, or no such file"
    )


class Kept:
    """What an interrupted call left, and what this one leaves.

    Raises:
        ValueError: a file of another call; the message says what differs.
    """

    def __init__(self, path: str | Path | None, key: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.key = json.loads(json.dumps(key))
        self.states: dict[str, Any] = {}
        values = None if self.path is None else left(self.path)
        if values is None:
            return
        before, self.states = values["key"], values["states"]
        if before != self.key:
            names = [name for name in self.key if before.get(name) != self.key[name]]
            raise ValueError(
                f"calibrate: {self.path} is of a calibration with other {', '.join(names)}; "
                "remove it to start anew"
            )

    def state(self, name: str) -> dict[str, Any] | None:
        """Of the form of that name; ``None`` where nothing was left."""
        state: dict[str, Any] | None = self.states.get(name)
        return state

    def keep(self, name: str, state: dict[str, Any]) -> None:
        """Leave the state of a form."""
        self.states[name] = state
        if self.path is not None:
            jsonl.replace(self.path, json.dumps({"key": self.key, "states": self.states}))

    def remove(self) -> None:
        """All is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
