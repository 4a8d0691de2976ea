"""Which modules of a model a config names, by PEFT's conventions."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vps.config import VPSConfig

ALL_LINEAR = "all-linear"


def matches(name: str, patterns: tuple[str, ...] | str) -> bool:
    """Whether a module name fits: a suffix of whole parts for a tuple, a full match for a regex."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def layer_index(name: str) -> int | None:
    """The block a module belongs to: the first part of its name that is a number."""
    for part in name.split("."):
        if part.isdigit():
            return int(part)
    return None


def select_names(names: Iterable[str], head: str | None, config: VPSConfig) -> list[str]:
    """Names of the linear layers that ``config`` asks for, in their order.

    Args:
        names: all linear layers of the model.
        head: the output head, which ``"all-linear"`` leaves out.
        config: target, excluded names and layers.
    """
    chosen = []
    for name in names:
        if config.target_modules == ALL_LINEAR:
            wanted = name != head
        else:
            wanted = matches(name, config.target_modules)
        if wanted and config.exclude_modules is not None:
            wanted = not matches(name, config.exclude_modules)
        if wanted and config.layers_to_transform is not None:
            wanted = layer_index(name) in config.layers_to_transform
        if wanted:
            chosen.append(name)
    return chosen
