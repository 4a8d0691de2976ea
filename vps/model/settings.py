"""Save how a model is sharpened as JSON without weights, and sharpen another in the same way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from vps import files
from vps.algorithm.policy import LayerGamma
from vps.config import VPSConfig
from vps.model import matching
from vps.model.calibration import FORMAT as CALIBRATION
from vps.model.calibration import Calibration, device_of, fingerprint
from vps.model.patching import (
    PatchReport,
    patch,
    policy_state,
    require_layers,
    shared_state,
    sharpened_layers,
    unpatch,
)
from vps.reading import parse_json, read_text

FORMAT = "vps-settings-1"


def save(model: nn.Module, path: str | Path) -> None:
    """Write the configs and the policy of a sharpened model to a JSON file.

    Args:
        model: a patched model.
        path: the file; it is replaced as a whole, or left as it was.

    Raises:
        ValueError: no sharpened layer in the model.
        OSError: the file cannot be written, or ``path`` is something else.
    """
    layers, state = require_layers(model, "vps.save"), shared_state(model, "vps.save")
    configs = {name: json.loads(layer.config.to_json()) for name, layer in layers.items()}
    values = {
        "format": FORMAT,
        "config": next(iter(configs.values())),
        "entropy": None if state.entropy is None else float(state.entropy),
        "outcomes": list(state.outcomes),
    }
    if any(config != values["config"] for config in configs.values()):
        values["configs"] = configs
    if any(own.gamma is not None for own in layers.values()):
        values["weights"] = fingerprint(model)
        values["gamma"] = {
            name: own.gamma.plain() for name, own in layers.items() if own.gamma is not None
        }
    files.replace(Path(path), json.dumps(values, indent=2))


def load(model: nn.Module, path: str | Path) -> PatchReport:
    """Sharpen ``model`` as :func:`save` or :meth:`vps.Calibration.save` recorded.

    Args:
        model: a model with the layers that the config names; it keeps its weights.
        path: the file.

    Returns:
        What was sharpened, as :func:`vps.patch` returns it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not one of :func:`save`, its γ belong to other weights, or
            :func:`vps.patch` raises. The model then stays as it was, or is left plain.
    """
    try:
        text = read_text(Path(path))
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(f"vps.load: {path}: {error}") from None
    if isinstance(values, dict) and values.get("format") == CALIBRATION:
        calibration = Calibration.from_json(text)
        report = patch(model, calibration.config)
        _or_unpatch(model, calibration.apply)
        return report
    keys = {"format", "config", "entropy", "outcomes"}
    if isinstance(values, dict):
        keys |= {"configs"} & set(values)
        keys |= {"gamma", "weights"} if "gamma" in values else set()
    if not isinstance(values, dict) or values.get("format") != FORMAT or set(values) != keys:
        raise ValueError(
            f"vps.load: {path} is no file of vps.save, whose format is {FORMAT!r}; for fields of "
            "VPSConfig use vps.patch(model, vps.VPSConfig.from_json(text))"
        )
    config = VPSConfig.from_json(json.dumps(values["config"]))
    own = values.get("configs", {})
    if not isinstance(own, dict):
        raise ValueError(f"vps.load: configs in {path} must be settings by name of a layer")
    configs = {name: VPSConfig.from_json(json.dumps(each)) for name, each in own.items()}
    if configs:  # they may name their layers in different ways
        names = "|".join(re.escape(name) for name in configs)
        scope = "token" if any(own.scope == "token" for own in configs.values()) else config.scope
        config = config.replace(
            target_modules=names, exclude_modules=None, layers_to_transform=None, scope=scope
        )
    report = patch(model, config)
    _or_unpatch(model, partial(_restore, values=values, configs=configs, path=path))
    return report


def _or_unpatch(model: nn.Module, give: Callable[[nn.Module], None]) -> None:
    try:
        give(model)
    except BaseException:
        unpatch(model)
        raise


def _restore(
    model: nn.Module, *, values: dict[str, Any], configs: dict[str, VPSConfig], path: str | Path
) -> None:
    """Give a patched model what :func:`save` recorded beside the first config."""
    layers: dict[str, Any] = sharpened_layers(model)
    if configs and set(configs) != set(layers):
        missing = sorted(set(configs) - set(layers))
        raise ValueError(f"vps.load: {path} names layers that the model lacks: {missing[:3]}")
    refused = matching.experts(model)
    for name, config in configs.items():
        if config.scope != "token" and (reason := refused.get(id(layers[name].module))):
            raise ValueError(f"vps.load: {path} gives {name} scope {config.scope!r}: {reason}")
        layers[name].config = config
    if "gamma" in values:
        _restore_gamma(model, values=values, path=path)
    state, outcomes = policy_state(model), values["outcomes"]
    state.reset()
    try:
        state.set_entropy(values["entropy"])
        if not isinstance(outcomes, list):
            raise TypeError("outcomes must be a list of booleans")
        for improved in outcomes:
            state.record(improved)
    except (TypeError, ValueError) as error:
        raise ValueError(f"vps.load: {path}: {error}") from None


def _restore_gamma(model: nn.Module, *, values: dict[str, Any], path: str | Path) -> None:
    layers: dict[str, Any] = sharpened_layers(model)
    given = values["gamma"]
    if not isinstance(given, dict) or not set(given) <= set(layers):
        raise ValueError(f"vps.load: gamma in {path} must be numbers by name of a sharpened layer")
    if values["weights"] != fingerprint(model):
        raise ValueError(f"vps.load: γ in {path} was fitted to other weights than the model's")
    try:
        made = {name: LayerGamma(own, device_of(layers[name])) for name, own in given.items()}
    except TypeError as error:
        raise ValueError(f"vps.load: {path}: {error}") from None
    for name, own in made.items():
        layers[name].gamma = own
