"""Save how a model is sharpened, and sharpen another in the same way: JSON, no weights."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from torch import nn

from vps.config import VPSConfig
from vps.patching import PatchReport, patch, policy_state, sharpened_layers

FORMAT = "vps-settings-1"


def save(model: nn.Module, path: str | Path) -> None:
    """Write config and policy of a sharpened model to a JSON file.

    Args:
        model: a patched model.
        path: the file; replaced as a whole, or left as it was.

    Raises:
        ValueError: no sharpened layer in the model.
        OSError: the file cannot be written.
    """
    state = policy_state(model)
    layer = next(iter(sharpened_layers(model).values()))
    values = {
        "format": FORMAT,
        "config": json.loads(layer.config.to_json()),  # type: ignore[union-attr,operator]
        "entropy": None if state.entropy is None else float(state.entropy),
        "outcomes": list(state.outcomes),
    }
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(values, file, indent=2)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(model: nn.Module, path: str | Path) -> PatchReport:
    """Sharpen ``model`` as :func:`save` recorded.

    Args:
        model: a model with the layers that the config names; weights are its own.
        path: the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not what :func:`save` wrote, or as for :func:`vps.patch`.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"vps.load: {path} is not valid JSON: {error}") from None
    keys = {"format", "config", "entropy", "outcomes"}
    if not isinstance(values, dict) or values.get("format") != FORMAT or set(values) != keys:
        raise ValueError(f"vps.load: {path} is no file of vps.save ({FORMAT})")
    config = VPSConfig.from_json(json.dumps(values["config"]))
    if not isinstance(values["outcomes"], list):
        raise ValueError(f"vps.load: outcomes in {path} must be a list of booleans")
    report = patch(model, config)
    state = policy_state(model)
    state.reset()
    state.set_entropy(values["entropy"])
    for improved in values["outcomes"]:
        state.record(improved)
    return report
