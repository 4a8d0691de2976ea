"""``VPSConv1D``: the sharpened form of Hugging Face's ``Conv1D``, GPT-2's transposed linear."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from vps import adapters
from vps.config import VPSConfig
from vps.linear import SharpenedLayer, as_class, parameter
from vps.own_forward import is_matrix
from vps.policy import PolicyState


class VPSConv1D(SharpenedLayer, Conv1D):  # type: ignore[misc]  # bias
    """A ``Conv1D`` with weight ``[d_in, d_out]``, sharpened with ``W`` its transpose."""

    @classmethod
    def from_conv1d(cls, conv1d: Conv1D, config: VPSConfig, state: PolicyState) -> Self:
        """A sharpened layer that shares the parameters of ``conv1d``."""
        return as_class(conv1d, cls, config=config, state=state)

    def to_conv1d(self) -> Conv1D:
        """The plain ``Conv1D`` of the same parameters and hooks."""
        return as_class(self, Conv1D)

    def forward(self, x: Tensor) -> Tensor:
        """Sharpened output ``[..., d_out]`` for x ``[..., d_in]``."""
        return self.answer(x)

    @property
    def widths(self) -> tuple[int, int]:
        return self.nf, self.nx

    def matrix(self) -> Tensor | None:
        weight = parameter(self, "weight")
        return weight.t() if is_matrix(weight) else None

    def vector(self) -> Tensor | None:
        return parameter(self, "bias")

    def apply_plain(self, x: Tensor, biased: bool) -> Tensor:
        return super().forward(x) if biased else x @ self.weight

    def __setstate__(self, state: dict[str, Any]) -> None:
        adapters.watch()
        super().__setstate__(state)
