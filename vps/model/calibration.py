"""Keep a calibration as a JSON file: γ of every layer, fitted to one model under one config.

It overrides the γ of :class:`vps.VPSConfig`. Another model, config or version of the weights
refuses it, and the message says what differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vps import files
from vps.algorithm.policy import LayerGamma, settings
from vps.config import VPSConfig
from vps.model.patching import patch, sharpened_layers, unpatch
from vps.reading import parse_json, read_text

FORMAT = "vps-calibration-1"
CHUNK = 2**24  # elements hashed at once

Gamma = float | tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """The γ of each layer, and what they belong to.

    Args:
        config: the settings during the fit; their γ is overridden.
        model: id of the model, for people.
        architecture: class of the model.
        weights: :func:`fingerprint` of its parameters.
        data: sha256 over the examples used for fitting and stopping.
        gamma: for every sharpened layer by name, a number of either sign, or one for each column; 0
            leaves the layer plain.
        examples: sha256 of every example used for fitting and stopping.
        scope: the scope under which the examples were scored.
        found: whether held-out examples showed an improvement; ``None`` if none were measured.
        report: what was measured, for :func:`vps.fitting.text`.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range; the message names it.
    """

    config: VPSConfig
    model: str
    architecture: str
    weights: str
    data: str
    gamma: Mapping[str, Gamma]
    examples: tuple[str, ...] = ()
    scope: str = "token"
    found: bool | None = None
    report: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "architecture", "weights", "data"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"Calibration.{name} is {getattr(self, name)!r}, expected a string")
        if not isinstance(self.config, VPSConfig):
            raise TypeError(f"Calibration.config is {self.config!r}, expected a VPSConfig")
        if self.scope not in VPSConfig.CHOICES["scope"]:
            allowed = VPSConfig.CHOICES["scope"]
            raise ValueError(f"Calibration.scope is {self.scope!r}, expected one of {allowed}")
        if self.found not in (True, False, None):
            raise TypeError(f"Calibration.found is {self.found!r}, expected true, false or null")
        if not isinstance(self.report, Mapping):
            raise TypeError(f"Calibration.report is {self.report!r}, expected an object")
        if not isinstance(self.examples, (list, tuple)) or not all(
            isinstance(each, str) for each in self.examples
        ):
            raise TypeError(f"Calibration.examples is {self.examples!r}, expected strings")
        object.__setattr__(self, "examples", tuple(self.examples))
        if not isinstance(self.gamma, Mapping) or not self.gamma:
            raise TypeError(
                f"Calibration.gamma is {self.gamma!r}, expected numbers by the name of a layer"
            )
        object.__setattr__(self, "gamma", {k: _gamma(k, v) for k, v in self.gamma.items()})

    @property
    def per(self) -> str:
        """Return ``"layer"`` or ``"column"``."""
        by_column = any(isinstance(value, tuple) for value in self.gamma.values())
        return "column" if by_column else "layer"

    def to_json(self) -> str:
        """Return everything as a JSON object."""
        values = dataclasses.asdict(self)
        values["config"] = json.loads(self.config.to_json())
        return json.dumps({"format": FORMAT, **values}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the calibration that :meth:`to_json` wrote.

        Args:
            text: a JSON object.

        Raises:
            ValueError: the text is no JSON object of this format, or a key is missing or unknown.
            TypeError: a value of the wrong type.
        """
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ValueError(f"Calibration.from_json: {error}") from None
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(
                f"Calibration.from_json: expected an object of format {FORMAT!r}, which `vps "
                "calibrate` and Calibration.save write"
            )
        names = {entry.name for entry in dataclasses.fields(cls)}
        for problem, found in (
            ("unknown", set(values) - names),
            ("missing", names - set(values)),
        ):
            if found:
                raise ValueError(
                    f"Calibration.from_json: {problem} key {', '.join(map(repr, sorted(found)))}"
                )
        config = VPSConfig.from_json(json.dumps(values.pop("config")))
        return cls(config=config, **values)

    def save(self, path: str | Path) -> None:
        """Write the file as a whole or not at all.

        Args:
            path: the file.

        Raises:
            OSError: the file cannot be written.
        """
        files.replace(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the calibration in a file that :meth:`save` wrote.

        Args:
            path: the file.

        Raises:
            OSError: the file cannot be read.
            TypeError, ValueError: as for :meth:`from_json`; the message names the file.
        """
        try:
            return cls.from_json(read_text(Path(path)))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None

    def differences(self, model: nn.Module) -> list[str]:
        """Return how the sharpened ``model`` differs from the calibrated one; empty if it fits."""
        layers: dict[str, Any] = sharpened_layers(model)
        found = []
        if type(model).__name__ != self.architecture:
            found.append(f"model is a {type(model).__name__}, expected a {self.architecture}")
        extra, missing = (
            sorted(set(layers) - set(self.gamma)),
            sorted(set(self.gamma) - set(layers)),
        )
        for kind, names in (("sharpened layers without a γ", extra), ("no such layers", missing)):
            if names:
                found.append(f"{kind}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}")
        own = dataclasses.asdict(self.config)
        for config in dict.fromkeys(layer.config for layer in layers.values()):
            other = dataclasses.asdict(config)
            found += [
                f"config field {name} is {other[name]!r}, expected {own[name]!r}"
                for name in own
                if own[name] != other[name]
            ]
        if not found:
            weights = fingerprint(model)
            if weights != self.weights:
                found.append(
                    f"weights are of version {weights[:12]}, expected {self.weights[:12]} "
                    f"({self.model}): other values or another dtype"
                )
        return found

    def apply(self, model: nn.Module) -> None:
        """Give every layer its γ, after sharpening a plain model with the config.

        Args:
            model: the calibrated model, plain or sharpened with the same config.

        Raises:
            ValueError: it belongs to another model, config or version of the weights; the message
                says what differs, and the model stays as it was.

        Warns:
            UserWarning: held-out examples showed no improvement.
        """
        if not sharpened_layers(model):
            patch(model, self.config)
            try:
                self._check(model)
            except ValueError:
                unpatch(model)
                raise
        else:
            self._check(model)
        layers: dict[str, Any] = sharpened_layers(model)
        made = {n: LayerGamma(self.gamma[n], device_of(one)) for n, one in layers.items()}
        for name, own in made.items():
            width = columns_of(layers[name])
            if own.by_column and len(own.numbers) != width:
                raise ValueError(
                    f"calibration: γ of {name} holds {len(own.numbers)} numbers, expected {width}"
                )
        for name, layer in layers.items():
            layer.gamma = made[name]
        if self.found is False:
            warnings.warn(
                "vps calibration: held-out examples showed no improvement by it", stacklevel=2
            )

    def _check(self, model: nn.Module) -> None:
        differences = self.differences(model)
        if differences:
            raise ValueError(f"vps calibration of {self.model}: refused: {'; '.join(differences)}")


def clear_calibration(model: nn.Module) -> None:
    """Take the γ of a calibration from every layer, so that the config's γ counts again.

    Args:
        model: a sharpened model.
    """
    layers: dict[str, Any] = sharpened_layers(model)
    for layer in layers.values():
        layer.gamma = None


def device_of(layer: Any) -> torch.device | None:
    """Return the device of a layer, or ``None`` where its weights are offloaded."""
    parameter = next(layer.module.parameters(), None)
    return None if parameter is None or parameter.is_meta else parameter.device


def columns_of(layer: Any) -> int:
    """Return the most columns that the update of a sharpened layer can have (SPEC §3)."""
    d_out, d_in = min(one.widths for one in layer.deciding())
    found = settings(layer.config, False, d_in, d_out, calibrated=True)
    assert found is not None
    return found.r


def fingerprint(model: nn.Module) -> str:
    """Return the sha256 over names, shapes, dtypes and bits of all parameters.

    Raises:
        ValueError: a parameter has no values (meta device).
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.is_meta:
            raise ValueError(f"fingerprint: parameter {name} is on the meta device")
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        for values in _plain_tensors(parameter.detach()):
            flat = values.reshape(-1)
            for start in range(0, len(flat), CHUNK):
                part = flat[start : start + CHUNK].cpu().contiguous().view(torch.uint8)
                digest.update(part.numpy().data)
    return digest.hexdigest()


def _plain_tensors(values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a plain tensor itself, or the tensors that make up one of torchao's."""
    if not is_traceable_wrapper_subclass(values):
        yield values
        return
    for name in values.__tensor_flatten__()[0]:
        yield from _plain_tensors(getattr(values, name))


def model_id(model: nn.Module) -> str:
    """Return the hub id by which the model was loaded, or the last part of its path."""
    config = getattr(model, "config", None)
    name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def _gamma(name: object, value: object) -> Gamma:
    if not isinstance(name, str):
        raise TypeError(f"Calibration.gamma has the key {name!r}, expected the name of a layer")
    many = isinstance(value, (list, tuple))
    numbers: list[Any] = list(value) if many else [value]  # type: ignore[call-overload]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"Calibration.gamma[{name!r}] is {value!r}, expected numbers")
        if not math.isfinite(number):
            raise ValueError(f"Calibration.gamma[{name!r}] is {value!r}, expected finite numbers")
    if not numbers:
        raise ValueError(f"Calibration.gamma[{name!r}] is empty, expected one number a column")
    found = tuple(float(number) for number in numbers)
    return found if many else found[0]
