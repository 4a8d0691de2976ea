"""What an interrupted calibration leaves, so that the same call goes on from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vps import jsonl


class Kept:
    """What an interrupted call left, and what this one leaves.

    Raises:
        ValueError: a file of another call; the message says what differs.
    """

    def __init__(self, path: str | Path | None, key: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.key = json.loads(json.dumps(key))
        self.states: dict[str, Any] = {}
        if self.path is None or not self.path.exists():
            return
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            before, states = values["key"], values["states"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"calibrate: {self.path} holds no interrupted calibration") from None
        if before != self.key:
            names = [name for name in self.key if before.get(name) != self.key[name]]
            raise ValueError(
                f"calibrate: {self.path} is of a calibration with other {', '.join(names)}; "
                "remove it to start anew"
            )
        self.states = states

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
