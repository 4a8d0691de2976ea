"""Where a serving engine finds its settings: ``VPS_CONFIG``, a JSON file or JSON text."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vps.config import VPSConfig
from vps.model.settings import FORMAT
from vps.reading import parse_json, read_text

VARIABLE = "VPS_CONFIG"


def from_environment() -> VPSConfig:
    """The config that ``VPS_CONFIG`` names; the defaults of :class:`VPSConfig` where it is unset.

    The variable holds the path of a JSON file, or the JSON object itself (``{"gamma": 0.1, …}``).
    Either is what :meth:`VPSConfig.to_json` or :func:`vps.save` writes.

    Raises:
        ValueError: no such file, not JSON, an unknown field, a bad value, or one that a server
            cannot compute with; the message starts with the variable and where the text is from.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if not value:
        return VPSConfig()
    if value.startswith("{"):
        return parse(value, VARIABLE)
    try:
        text = read_text(Path(value).expanduser())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{VARIABLE}={value}: expected the path of a JSON file, or a JSON object: {error}"
        ) from None
    return parse(text, f"{VARIABLE}={value}")


def parse(text: str, origin: str) -> VPSConfig:
    """The config in ``text``, checked as for :func:`from_environment`; ``origin`` is for errors."""
    try:
        config = VPSConfig.from_json(_config_text(text))
        check(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{origin}: {error}") from None
    return config


def check(config: VPSConfig) -> None:
    """Refuse what depends on the other requests of a batch.

    Raises:
        ValueError: ``scope="batch"``.
    """
    if config.scope == "batch":
        raise ValueError(
            "scope='batch' would let the requests of a batch change each other's tokens; "
            "expected 'token' or 'sequence'"
        )


def _config_text(text: str) -> str:
    """The config alone, where ``text`` is what :func:`vps.save` wrote."""
    try:
        values = parse_json(text)
    except ValueError:
        return text  # for VPSConfig to refuse
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return text
    if values.get("entropy") is not None or values.get("outcomes"):
        raise ValueError(
            "it holds an entropy or outcomes of a refinement, which a server has no place for; "
            "save the model after vps.policy_state(model).reset()"
        )
    return json.dumps(values.get("config"))
