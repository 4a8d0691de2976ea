"""Read what people wrote: UTF-8 text with or without a byte-order mark, JSON, YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MARK = "\ufeff"


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the text is not UTF-8.
    """
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text, at byte {error.start}") from None


def read_values(path: Path) -> Any:
    """Return the value in a JSON or YAML file; a name ending in ``.json`` allows JSON alone.

    Raises:
        OSError: the file cannot be read.
        ValueError: the text is neither JSON nor YAML, or :func:`parse_json` refuses it.
        ModuleNotFoundError: the text is no JSON, and pyyaml is missing.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError:
        if path.suffix.lower() == ".json":
            raise
    return parse_yaml(text)


def parse_json(text: str) -> Any:
    """Return the value of JSON text.

    Raises:
        ValueError: the text is no JSON, is nested too deeply, or has a key twice in one object.
    """
    try:
        return json.loads(text.removeprefix(MARK), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """Return the value of YAML text, which may hold plain types alone.

    Raises:
        ValueError: the text is no YAML, is nested too deeply, or has a key twice in one mapping.
        ModuleNotFoundError: pyyaml is missing.
    """
    try:
        import yaml
    except ImportError:
        raise ModuleNotFoundError(
            "what is no JSON needs pyyaml to be read as YAML: pip install 'vps-kernels[eval]'"
        ) from None

    class Loader(yaml.SafeLoader):
        """A loader that refuses a key that comes twice; YAML itself keeps the last."""

    def mapping(loader: Any, node: Any) -> Any:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        _once([(loader.construct_object(key, deep=True), None) for key in own])
        loader.flatten_mapping(node)  # a key may override what is merged in
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
