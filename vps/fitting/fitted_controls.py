"""Make the controls that are fitted beside sharpening, each to as many numbers.

An output scale, and a LoRA of rank 1; sharpening of features that are drawn at random
or were selected most often is :class:`Sharpening` with ``features``.

A LoRA of rank 1 on all layers has thousands of numbers for each γ. So it gets as many as there are
γ, on the layers whose ``B`` has the largest mean square gradient on the fitting examples: of each
all of ``B``, then all of ``A``, and of the last only so many as are left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vps.algorithm import selection
from vps.fitting.candidates import Candidate, Features, matrix_of
from vps.fitting.descent import gradients
from vps.fitting.examples import Encoded
from vps.model.calibration import columns_of


class Scale(Candidate):
    """Scale the output, ``(1 + a) · H``; by column, as many blocks of features have their own a."""

    name = "scale"

    def compute(self, layer: Any, x: Tensor) -> Tensor | None:
        own, W = self.own(layer), layer.matrix()
        if own is None:
            return None
        if self.by_column:
            index = torch.arange(len(W), device=W.device) * len(own) // len(W)
            own = own[index]
        y = F.linear(x, W) * (1 + own).to(x.dtype)
        return y if layer.bias is None else y + layer.bias


class LoRA(Candidate):
    """Compute ``y = H + b + B A x`` with A drawn and B 0 at first, in the layers of ``chosen``.

    Args:
        model: a patched model.
        chosen: names of layers, best first.
        count: how many numbers are fitted; the others keep their first values.
        seed: of A.
    """

    name = "lora"

    def __init__(self, model: nn.Module, chosen: Sequence[str], count: int, seed: int) -> None:
        super().__init__(model, list(chosen), False)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.masks: list[Tensor] = []
        left = count
        for number, name in enumerate(chosen):
            weight = matrix_of(name, self.layers[name])
            d_out, d_in = weight.shape
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            bound = d_in**-0.5  # as PEFT draws A
            drawn = torch.rand(1, d_in, generator=generator) * 2 * bound - bound
            A = drawn.to(weight.device, weight.dtype).requires_grad_()
            B = weight.new_zeros(d_out, 1).requires_grad_()
            self.factors[name] = A, B
            for fitted in (B, A):
                free = min(left, fitted.numel())
                left -= free
                mask = (torch.arange(fitted.numel(), device=weight.device) < free).to(weight.dtype)
                self.masks.append(mask.view_as(fitted))
                fitted.register_hook(self.masks[-1].mul)
        self._count = count - left

    @property
    def parameters(self) -> list[Tensor]:
        return [factor for A, B in self.factors.values() for factor in (B, A)]

    @property
    def count(self) -> int:
        return self._count

    def compute(self, layer: Any, x: Tensor) -> Tensor | None:
        if id(layer) not in self.parts:
            return None
        A, B = self.factors[self.parts[id(layer)][0]]
        return F.linear(x, layer.matrix(), layer.bias) + F.linear(F.linear(x, A), B)


def lora(
    model: nn.Module,
    names: Sequence[str],
    count: int,
    examples: Sequence[Encoded],
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> LoRA:
    """Make a LoRA of ``count`` numbers on the layers of ``names`` that have the most to gain.

    Args:
        model: a patched model, frozen.
        names: layers to choose from.
        count: how many numbers.
        examples: to choose by, one backward pass of each.
        seed: of A.
        advance: called after every example.
    """
    everywhere = LoRA(model, names, 2**62, seed)
    totals = {name: 0.0 for name in names}
    for found in gradients(model, everywhere, examples):
        for name, grad in zip(names, found[::2], strict=True):
            totals[name] += float(grad.double().square().mean())
        advance()
    ranked = sorted(names, key=lambda name: -totals[name])
    chosen, left = [], count
    for name in ranked:
        chosen.append(name)
        left -= sum(factor.numel() for factor in everywhere.factors[name])
        if left <= 0:
            break
    return LoRA(model, chosen, count, seed)


def random_features(candidate: Candidate, seed: int) -> dict[str, Features]:
    """Draw features of every layer of ``candidate`` by ``seed``, others in every layer."""
    found = {}
    for number, name in enumerate(candidate.names):
        layer = candidate.layers[name]
        d_out, d_in = layer.widths
        own = seed * 1_000_003 + number
        drawn = selection.random_features(own, d_in, d_out, columns_of(layer))
        found[name] = tuple(torch.tensor(index, device=candidate.values.device) for index in drawn)
    return found  # type: ignore[return-value]


def frequent_features(candidate: Candidate, counts: Mapping[str, Features]) -> dict[str, Features]:
    """Return the features that every layer selected most often, ties to the lower index."""
    found = {}
    for name in candidate.names:
        r = columns_of(candidate.layers[name])
        found[name] = tuple(
            torch.sort(count, descending=True, stable=True).indices[:r] for count in counts[name]
        )
    return found  # type: ignore[return-value]
