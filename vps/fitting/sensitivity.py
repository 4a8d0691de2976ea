"""Measure ∂L/∂γ of every layer at γ = 0, and how much of it is noise; nothing is fitted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vps.config import VPSConfig
from vps.fitting.candidates import Sharpening
from vps.fitting.descent import gradients
from vps.fitting.examples import LONGEST, Encoded, parse_all, told, usable
from vps.model.capture import restored
from vps.model.patching import (
    check_module,
    check_scope,
    patch,
    policy_state,
    sharpened_layers,
    unpatch,
)


@dataclass(frozen=True)
class Sensitivity:
    """Hold ∂L/∂γ of one layer.

    Args:
        name: name of the layer.
        gradient: ``∂L/∂γ`` at γ = 0, in nats per scored token: the loss falls where γ goes the
            other way.
        error: its standard error over the examples.
        halves: the gradient over each half of the examples.
    """

    name: str
    gradient: float
    error: float
    halves: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Return ``|gradient| / error``; 0 where both are."""
        if self.gradient == 0:
            return 0.0
        return math.inf if self.error == 0 else abs(self.gradient) / self.error

    @property
    def agrees(self) -> bool:
        """Tell whether both halves have the sign of the whole."""
        return all(half * self.gradient > 0 for half in self.halves)


def sensitivity(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Any],
    *,
    config: VPSConfig | None = None,
    scope: str = "token",
    chat: bool = True,
    longest: int = LONGEST,
    progress: Callable[[str, int], None] | None = None,
    advance: Callable[[], None] | None = None,
) -> list[Sensitivity]:
    """Measure ``∂L/∂γ`` of every layer at γ = 0, with its noise.

    Arguments are as for :func:`vps.calibrate`; the model comes back as it was.

    Returns:
        The gradient and its noise for each layer, the largest gradient first.

    Raises:
        TypeError, ValueError: as for :func:`calibrate`.

    Warns:
        UserWarning: examples were left out.
    """
    parsed = parse_all("example", examples)
    if not parsed:
        raise ValueError("calibrate: expected at least one example, got none")
    with prepared(model, config, scope):
        device = next(model.parameters()).device
        codes, left_out = usable(
            tokenizer, "examples", parsed, chat=chat, longest=longest, device=device
        )
        if left_out:
            warnings.warn(f"vps.calibrate: {told(left_out, len(parsed))}", stacklevel=2)
        use = [code for _, code in codes]
        if progress is not None:
            progress("taking gradients", len(use))
        candidate = Sharpening(model, list(sharpened_layers(model)), False)
        return sensitivities(model, candidate, use, advance or (lambda: None))


@contextmanager
def prepared(model: nn.Module, config: VPSConfig | None, scope: str) -> Iterator[VPSConfig]:
    """Sharpen and freeze ``model`` under ``scope``, give its config, and put it back as it was.

    Raises:
        ValueError: layers of several configs, or of another than ``config``.
    """
    if scope not in VPSConfig.CHOICES["scope"]:
        allowed = VPSConfig.CHOICES["scope"]
        raise ValueError(f"calibrate: scope must be one of {allowed}, got {scope!r}")
    check_module(model, "calibrate")
    patched_here = not sharpened_layers(model)
    if patched_here:
        patch(model, config)
    try:
        held: dict[str, Any] = sharpened_layers(model)
        configs = list(dict.fromkeys(layer.config for layer in held.values()))
        if len(configs) > 1:
            raise ValueError(f"calibrate: the layers have {len(configs)} configs, expected one")
        if config is not None and config != configs[0]:
            raise ValueError(
                "calibrate: the model is sharpened with another config than the one given"
            )
        check_scope(model, scope, "calibrate")
        with restored(model):
            policy_state(model).reset()
            for layer in held.values():
                layer.gradient, layer.memory = False, None
                layer.config = layer.config.replace(scope=scope)
            yield configs[0]
    finally:
        if patched_here:
            unpatch(model)


def sensitivities(
    model: Any,
    candidate: Sharpening,
    examples: Sequence[Encoded],
    advance: Callable[[], None] = lambda: None,
) -> list[Sensitivity]:
    """Measure every layer of ``candidate``, largest gradient first; columns are summed.

    Examples count by their scored tokens. Those of odd and of even place are the halves.
    """
    rows = []
    weights = torch.tensor([float(each.scored) for each in examples], dtype=torch.float64)
    for (own,) in gradients(model, candidate, examples):
        rows.append(torch.stack([own[part].sum().cpu() for _, part in candidate.parts.values()]))
        advance()
    table = torch.stack(rows).double()
    share = (weights / weights.sum()).unsqueeze(1)
    mean = (table * share).sum(0)
    n = len(examples)
    spread = ((table - mean) * share).square().sum(0)
    error = (spread * n / (n - 1)).sqrt() if n > 1 else torch.full_like(mean, math.nan)
    halves = [
        (table[i::2] * share[i::2]).sum(0) / share[i::2].sum() if n > 1 else mean for i in (0, 1)
    ]
    columns = (values.tolist() for values in (mean, error, *halves))
    found = [
        Sensitivity(name, gradient, deviation, (first, second))
        for (name, _), gradient, deviation, first, second in zip(
            candidate.parts.values(), *columns, strict=True
        )
    ]
    return sorted(found, key=lambda each: -abs(each.gradient))


def agreement(found: Sequence[Sensitivity]) -> float:
    """Correlate the gradients of the halves over the layers; NaN for one layer."""
    if len(found) < 2:
        return math.nan
    pair = torch.tensor([each.halves for each in found], dtype=torch.float64).T
    return float(torch.corrcoef(pair)[0, 1])
