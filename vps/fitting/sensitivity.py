"""∂L/∂γ of every layer at γ = 0, and how much of it is noise, without fitting anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vps.fitting.descent import gradients
from vps.fitting.examples import Encoded
from vps.fitting.forms import Sharpening


@dataclass(frozen=True)
class Sensitivity:
    """One layer.

    Args:
        name: of the layer.
        gradient: ``∂L/∂γ`` at γ = 0, in nats per scored token: the loss falls where γ goes the
            other way.
        error: its standard error over the examples.
        halves: the same of either half of the examples.
    """

    name: str
    gradient: float
    error: float
    halves: tuple[float, float]

    @property
    def ratio(self) -> float:
        """``|gradient| / error``; 0 where both are."""
        if self.gradient == 0:
            return 0.0
        return math.inf if self.error == 0 else abs(self.gradient) / self.error

    @property
    def agrees(self) -> bool:
        """Whether both halves have the sign of the whole."""
        return all(half * self.gradient > 0 for half in self.halves)


def sensitivities(
    model: Any,
    form: Sharpening,
    examples: Sequence[Encoded],
    advance: Callable[[], None] = lambda: None,
) -> list[Sensitivity]:
    """Every layer of ``form``, largest gradient first; of columns the sum.

    Examples count by their scored tokens. Those of odd and of even place are the halves.
    """
    rows = []
    weights = torch.tensor([float(each.scored) for each in examples], dtype=torch.float64)
    for (own,) in gradients(model, form, examples):
        rows.append(torch.stack([own[part].sum().cpu() for _, part in form.parts.values()]))
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
            form.parts.values(), *columns, strict=True
        )
    ]
    return sorted(found, key=lambda each: -abs(each.gradient))


def agreement(found: Sequence[Sensitivity]) -> float:
    """Correlation between the halves' gradients over the layers; NaN for one layer."""
    if len(found) < 2:
        return math.nan
    pair = torch.tensor([each.halves for each in found], dtype=torch.float64).T
    return float(torch.corrcoef(pair)[0, 1])
