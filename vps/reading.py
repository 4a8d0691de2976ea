"""Read what people wrote: UTF-8 text with or without a byte-order mark, JSON, YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MARK = "\ufeff"


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text, at byte {error.start}") from None


def read_values(path: Path) -> Any:
    """What a JSON or YAML file holds; JSON alone where its name ends in ``.json``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither, or as for :func:`parse_json`.
        ModuleNotFoundError: it is no JSON, and pyyaml is missing.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError:
        if path.suffix.lower() == ".json":
            raise
    return parse_yaml(text)


def parse_json(text: str) -> Any:
    """The value that JSON text stands for.

    Raises:
        ValueError: no JSON, nested too deeply, or an object with a key twice.
    """
    try:
        return json.loads(text.removeprefix(MARK), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """The value that YAML text stands for, of plain types alone.

    Raises:
        ValueError: no YAML, nested too deeply, or a mapping with a key twice.
        ModuleNotFoundError: pyyaml is missing.
    """
    try:
        import yaml
    except ImportError:
        raise ModuleNotFoundError(
            "what is no JSON needs pyyaml to be read as YAML: pip install 'vps-kernels[eval]'"
        ) from None

    class Loader(yaml.SafeLoader):
        """Refuses a key that comes twice, of which YAML would keep the last."""

    def mapping(loader: Any, node: Any) -> Any:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        _once([(loader.construct_object(key, deep=True), None) for key in own])
        loader.flatten_mapping(node)  # what is merged in may be set anew
        return dict(loader.construct_pairs(node, deep=True))

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text.removeprefix(MARK), Loader)  # a SafeLoader
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError("not valid YAML: nested too deeply") from None


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} comes twice")
        found[key] = value
    return found
